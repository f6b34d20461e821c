"""Backend `xla_scan`: plain JAX that walks the input channels in chunks, unpacks one, multiplies, accumulates.

The unpacked chunk stays in cache, so for few rows on a CPU it is several times faster than unpacking the whole matrix,
and the memory it needs is one chunk on any platform. It is what a CPU without our C++ extension uses.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from lq_kernels import xla
from lq_kernels.backend import PreparedMatrix, Problem, require
from lq_kernels.packed import PackedMatrix

MAX_ROWS = 512


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    chunk: int = 512  # input channels unpacked at a time; rounded up to whole groups and whole words

    def __post_init__(self):
        require(self, "chunk", self.chunk >= 1, "1 or more input channels")


def scan_matmul(x: Array, w: PackedMatrix, out_dtype, chunk: int) -> Array:
    """x `[M, K]` @ w, `chunk` input channels at a time, accumulated in float32."""
    unit = math.lcm(w.group_size, 32)
    chunk = math.ceil(chunk / unit) * unit
    count = w.in_features // chunk
    whole = count * chunk
    total = jnp.zeros((x.shape[0], w.out_features), jnp.float32)
    if count:
        chunks = jax.tree.map(lambda a: a.reshape(count, -1, a.shape[-1]), w.rows(0, whole))
        chunks = dataclasses.replace(chunks, in_features=chunk)
        x_chunks = jnp.moveaxis(x[:, :whole].reshape(-1, count, chunk), 1, 0)

        def add(y, step):
            x_chunk, w_chunk = step
            return y + xla.unpacked_matmul(x_chunk, w_chunk, jnp.float32), None

        total, _ = lax.scan(add, total, (x_chunks, chunks))
    if whole < w.in_features:
        total += xla.unpacked_matmul(x[:, whole:], w.rows(whole, w.in_features - whole), jnp.float32)
    return total.astype(out_dtype)


def _matmul(x: Array, w: PreparedMatrix, *, out_dtype, config: ScanConfig, interpret=False) -> Array:
    return xla.sum_over_segments(functools.partial(scan_matmul, chunk=config.chunk), x, w.arrays, out_dtype)


def _declines(problem: Problem) -> str | None:
    if problem.rows > MAX_ROWS:
        return f"more than {MAX_ROWS} rows: unpacking once and one dot are faster"
    return None


BACKEND = dataclasses.replace(
    xla.BACKEND,
    name="xla_scan",
    declines=_declines,
    matmul=_matmul,
    partitionable=False,  # a loop over the input channels would gather a matrix that is cut along them
    symbolic_rows=False,  # a copy of x in chunks is made for a number of rows
    config_type=ScanConfig,
    default_config=lambda problem, target: ScanConfig(),
    candidates=lambda problem, target: [ScanConfig(chunk=chunk) for chunk in (128, 256, 512, 1024, 2048)],
)
