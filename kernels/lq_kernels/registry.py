"""The backends by name, and the order in which each platform tries them.

A backend's module is imported when it is first asked for: a program on a CPU never pays for Mosaic.
"""

import importlib

from lq_kernels.backend import Backend

# name -> module that holds it as BACKEND
MODULES = {
    "mosaic_gpu": "lq_kernels.gpu",
    "mosaic_tpu": "lq_kernels.tpu",
    "cpu": "lq_kernels.cpu",
    "xla_scan": "lq_kernels.xla_scan",
    "xla": "lq_kernels.xla",
}

ORDER = {
    "cpu": ("xla_scan", "xla"),
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
