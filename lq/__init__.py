"""Layer-wise low-bit quantization of language models in JAX.

The functions below are imported when first used, so that `import lq` costs nothing; see `lq.api` for what they do.
"""

import importlib

from lq.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Pin",
    "QuantSpec",
    "UserError",
    "Windows",
    "allocate",
    "calibration_windows",
    "evaluate",
    "evaluation_windows",
    "generate",
    "load",
    "make_reference",
    "open_model",
    "prepare",
    "quantize",
    "quantize_checkpoint",
    "save",
    "score",
    "search",
    "transform",
    "uniform_plan",
]

_LAZY = {name: "lq.api" for name in __all__ if name != "UserError"}
_LAZY |= {
    "generate": "lq.models.generate",
    "Pin": "lq.allocation.pins",
    "QuantSpec": "lq.numerics.spec",
    "Windows": "lq.calibration.data",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lq' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
