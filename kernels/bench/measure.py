"""What every benchmark here shares: where it ran, what the memory can do, how results are written."""

import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lq_kernels.timing import compile_chains, time_chains


def environment() -> dict:
    """Device, versions, and when: what a reader needs to judge or repeat a figure."""
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "numpy": np.__version__}
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version.splitlines()[0],
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def copy_bandwidth(nbytes: int = 1 << 30, copies: int = 4, repeats: int = 10) -> float:
    """Bytes per second, read and written, of x + 1 over arrays of `nbytes`: the ceiling figures are held against."""
    arrays = [jnp.full((nbytes // 4,), i, jnp.float32) for i in range(copies)]
    step = lambda x, a: a + x[0, 0]  # noqa: E731
    x = jnp.ones((1, 1))
    timing = time_chains(compile_chains(step, x, arrays), x, arrays, repeats)
    return 2 * nbytes / (timing.median * 1e-6)


def write_json(file: Path, content: dict) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def table(header: list[str], rows: list[list]) -> str:
    """Plain text, columns aligned to the right; numbers as they are given."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
