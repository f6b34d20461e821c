"""The call into C++: operands and attributes of `lq_quantized_matmul`, in the order that `src/ffi.cc` reads."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lq_kernels.cpu.library import TARGET, library

PANEL = 128  # columns of a prepared panel; kPanel in src/product.h
X_TYPES = ("float32", "bfloat16", "float16")
STORED_TYPES = (*X_TYPES, "uint8", "int8", "uint32", "int32")


@dataclasses.dataclass(frozen=True)
class Operand:
    """One segment: its arrays, canonical `[rows, N]` or prepared `[panels, rows, PANEL]`, and its static facts."""

    planes: tuple[Array, ...]  # uint32
    scales: Array  # float
    zeros: Array | None
    zero_point: float
    bits: int
    group_size: int
    in_features: int


def call(
    x: Array,
    segments: Sequence[Operand],
    *,
    out_features: int,
    out_dtype,
    prepared: bool,
    codebook: Array | None = None,
    isa: str | None = None,
    threads: int = 1,
) -> Array:
    """y `[M, N]` = x `[M, K]` @ segments.

    Args:
      codebook: float32 `[16]`, the numbers that codes 0, 1, ... stand for; None: themselves.
      isa: one of `library().supported`; None: the best of them.
      threads: of XLA's pool; 0: all of them. The result does not depend on it.
    """
    compiled = library().compiled  # also registers the target
    index = -1 if isa is None else compiled.index(isa)
    head = [index, threads, prepared, codebook is not None, out_features, len(segments)]
    each = [(s.bits, s.in_features, s.group_size, s.zeros is not None) for s in segments]
    operands = [x]
    for s in segments:
        operands += [*s.planes, _stored(s.scales, X_TYPES)]
        if s.zeros is not None:
            operands.append(_stored(s.zeros, STORED_TYPES))
    if codebook is not None:
        operands.append(codebook)
    run = jax.ffi.ffi_call(
        TARGET, jax.ShapeDtypeStruct((x.shape[0], out_features), out_dtype), vmap_method="sequential"
    )
    return run(
        *operands,
        layout=np.array([*head, *np.ravel(each)], np.int64),
        zero_points=np.array([s.zero_point for s in segments], np.float32),
    )


def _stored(array: Array, types: tuple[str, ...]) -> Array:
    return array if str(array.dtype) in types else array.astype(jnp.float32)
