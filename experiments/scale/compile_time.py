"""Seconds of compiling against the number of blocks, which are unrolled: Llama-3-8B's shape, and no weights.

    python -m experiments.scale.compile_time [--topology v5e:2x4] [--out experiments/scale/measured/compile_time.json]

A step of decoding one token, of the packed model as it is laid out for the devices: this CPU, or with --topology the
TPUs of that name (`lq[tpu]`). Widths are alike in all blocks or mixed, 2 to 4 bits drawn for every matrix. Tracing is
Python's part, compiling the compiler's; every case is traced and compiled from nothing.
"""

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import jax

from experiments.rows import markdown
from lq.atomic import write_text
from lq.models.config import ModelConfig
from lq.models.loading import read_config
from lq.models.matrices import matrices
from lq.numerics.spec import QuantSpec
from lq.parallel import make_mesh
from lq.parallel.memory import Step, lowered_step
from lq.runs.environment import device_name, versions

HERE = Path(__file__).parent
BLOCKS = (2, 4, 8, 16, 32)


def specs_of(config: ModelConfig, mixed: bool) -> dict[str, QuantSpec]:
    """3 bits in groups of 128, or the widths that were drawn."""
    draw = random.Random(0)
    return {path: QuantSpec(bits=draw.choice((2, 3, 4)) if mixed else 3) for path in matrices(config)}


def measured(config: ModelConfig, mesh: jax.sharding.Mesh, blocks: int, mixed: bool) -> dict[str, float]:
    """Seconds of tracing and of compiling."""
    jax.clear_caches()
    started = time.perf_counter()
    lowered = lowered_step(config, specs_of(config, mixed), Step(length=2048), mesh, blocks)
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter() - traced
    return {"blocks": blocks, "mixed": mixed, "tracing": round(traced - started, 2), "compiling": round(compiled, 2)}


def table(found: list[dict]) -> str:
    """Markdown: a line for each number of blocks; a block more is what it takes over half as many, by block."""
    rows = []
    for blocks in sorted({case["blocks"] for case in found}):
        cells = [str(blocks)]
        for mixed in (False, True):
            seconds = {case["blocks"]: case["tracing"] + case["compiling"] for case in found if case["mixed"] == mixed}
            half = seconds.get(blocks // 2)
            more = "" if half is None else f"{(seconds[blocks] - half) / (blocks - blocks // 2):.2f}"
            cells += [f"{seconds[blocks]:.1f}", more]
        rows.append(cells)
    return markdown(["blocks", "alike, s", "a block more", "mixed, s", "a block more"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--topology", help="TPUs to compile for, such as v5e:2x4; this machine's CPU when not given")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--out", type=Path, default=HERE / "measured" / "compile_time.json")
    arguments = parser.parse_args()
    if arguments.topology is None:
        mesh, device = make_mesh("", jax.devices()[:1]), device_name()
    else:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
        mesh, device = make_mesh(f"tensor={len(devices)}", devices), arguments.topology
    config, found = read_config(HERE / "models" / "llama31_8b"), []
    config = dataclasses.replace(config, kinds=config.kinds[:1] * max(arguments.blocks))
    for mixed in (False, True):
        for blocks in arguments.blocks:
            found.append(measured(config, mesh, blocks, mixed))
            print(found[-1], flush=True)
    facts = {"device": device, "versions": versions(), "cases": found}
    write_text(arguments.out, json.dumps(facts, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
