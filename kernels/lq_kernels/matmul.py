"""`quantized_matmul`: x @ w for a packed w. One public function, one registry of backends behind it.

A backend is a function `(x, w, out_dtype) -> y` that raises `NotImplementedError` with its reason when it cannot serve
a case. The dispatcher takes the first that can; when none can, the error carries every reason. The XLA backend, last in
the list, serves everything.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from lq_kernels.packed import PackedMatrix

Backend = Callable[[Array, PackedMatrix, jnp.dtype], Array]


def xla_matmul(x: Array, w: PackedMatrix, out_dtype) -> Array:
    """Unpacks to x's dtype, then one dot; XLA decides what is fused. The reference for every other backend."""
    return jnp.matmul(x, w.dequantize(x.dtype), preferred_element_type=out_dtype)


BACKENDS: dict[str, Backend] = {"xla": xla_matmul}


def quantized_matmul(x: Array, w: PackedMatrix, *, backend: str | None = None, out_dtype=None) -> Array:
    """y = x @ dequantize(w), without storing the dequantized matrix where a backend can avoid it.

    Args:
      x: activations `[..., K]`, bfloat16, float16 or float32; K must equal `w.in_features`.
      w: one packed matrix, no leading axes.
      backend: a name from `BACKENDS` to force, or None for the first that can.
      out_dtype: dtype of the result; x's when None.

    Raises:
      ValueError: shapes do not fit, or `backend` is no known name.
      NotImplementedError: the forced backend cannot serve this case.
    """
    _check(x, w)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
        return BACKENDS[backend](x, w, out_dtype)
    refusals = []
    for name, run in BACKENDS.items():
        try:
            return run(x, w, out_dtype)
        except NotImplementedError as reason:
            refusals.append(f"{name}: {reason}")
    raise NotImplementedError("no backend can serve this product: " + "; ".join(refusals))


def _check(x: Array, w: PackedMatrix) -> None:
    if w.scales.ndim != 2:
        raise ValueError(f"expected one packed matrix, got a stack of shape {w.scales.shape[:-2]}")
    if x.shape[-1] != w.in_features:
        raise ValueError(f"x has {x.shape[-1]} channels, the matrix takes {w.in_features}")
    groups = math.ceil(w.in_features / w.group_size)
    if w.scales.shape[0] != groups:
        raise ValueError(
            f"{w.in_features} channels in groups of {w.group_size} need {groups} scales, got {w.scales.shape[0]}"
        )
