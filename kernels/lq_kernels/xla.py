"""Backend `xla`: no kernel of ours. The matrix is unpacked whole to x's dtype, then one dot.

It serves everything, on every platform, under automatic partitioning too, and every other backend falls back on it. It
saves memory at rest, not time: XLA writes the unpacked matrix out before the dot. For bfloat16 and float16 x each
weight is rounded to that dtype; the other backends keep codes exact and scale after the sum.
"""

import dataclasses
import functools
import itertools
import operator

import jax.numpy as jnp
from jax import Array, lax

from lq_kernels.backend import Backend, PreparedMatrix
from lq_kernels.packed import PackedMatrix


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """Nothing to tune."""


def unpacked_matmul(x: Array, w: PackedMatrix, out_dtype) -> Array:
    """x `[..., K]` @ w, w unpacked to x's dtype, accumulated in float32; float32 x at the highest precision."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.matmul(x, w.dequantize(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)


def sum_over_segments(multiply, x: Array, segments: tuple[PackedMatrix, ...], out_dtype) -> Array:
    """The sum of `multiply(x_s, segment, float32)`, rounded once."""
    ends = list(itertools.accumulate(segment.in_features for segment in segments))
    parts = jnp.split(x, ends[:-1], axis=-1)
    products = [multiply(part, segment, jnp.float32) for part, segment in zip(parts, segments, strict=True)]
    return functools.reduce(operator.add, products).astype(out_dtype)


def _matmul(x: Array, w: PreparedMatrix, *, out_dtype, config, interpret=False) -> Array:
    return sum_over_segments(unpacked_matmul, x, w.arrays, out_dtype)


BACKEND = Backend(
    name="xla",
    platforms=(),
    refuses=lambda problem: None,
    target=lambda device_kind: "canonical",
    target_in_call=lambda device_kind: "canonical",
    prepare=lambda segments, target: segments,
    restore=lambda prepared: prepared.arrays,
    matmul=_matmul,
    partitionable=True,
    symbolic_rows=True,
    config_type=XlaConfig,
    default_config=lambda problem, target: XlaConfig(),
    candidates=lambda problem, target: [XlaConfig()],
)
