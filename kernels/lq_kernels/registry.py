"""The backends by name, and the order in which each platform tries them.

A backend's module is imported when it is first asked for: a program on a CPU never pays for Mosaic.
"""

import importlib

import jax

from lq_kernels.backend import Backend

# name -> module that holds it as BACKEND
MODULES = {
    "mosaic_gpu": "lq_kernels.gpu",
    "mosaic_tpu": "lq_kernels.tpu",
    "cpu": "lq_kernels.cpu",
    "xla_scan": "lq_kernels.xla_scan",
    "xla": "lq_kernels.xla",
}

# What the backends' programs call by name. JAX promises nothing about such calls from one version to the next.
CUSTOM_CALLS = ("tpu_custom_call", "mosaic_gpu_v2", "lq_quantized_matmul")

ORDER = {
    "cuda": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
    "cpu": ("cpu", "xla_scan", "xla"),
}


def backend_names() -> tuple[str, ...]:
    return tuple(MODULES)


def automatic(platform: str) -> tuple[str, ...]:
    """Names in the order in which they are tried on `platform`; XLA alone where we have nothing better."""
    return ORDER.get(platform, ("xla",))


def load_backend(name: str) -> Backend:
    """Raises ValueError for a name that is none of `backend_names()`."""
    if name not in MODULES:
        raise ValueError(f"no backend is called {name!r}; known: {', '.join(MODULES)}")
    return importlib.import_module(MODULES[name]).BACKEND


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """For `jax.export.export(f, platforms=..., disabled_checks=export_checks())` of a program with packed products.

    `jax.export` refuses custom calls it makes no promises for; this allows ours. The program then runs with the
    versions of JAX and lq_kernels it was exported with; on a CPU, where the C++ extension served it, `lq_kernels` must
    be imported first. A program that runs anywhere is exported with LQ_KERNELS_BACKEND=xla, and needs no such list.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
