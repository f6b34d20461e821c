"""Backend `cpu`: C++ through `jax.ffi`, with AMX, AVX-512, AVX2, NEON or portable code chosen at run time.

`src/` is compiled when the package is installed and a C++ compiler is found, or by `python -m lq_kernels.cpu.build`.
Without it the backend refuses, with the reason that `status()` gives.

Prepared layout: panels of 128 output channels, `[N/128, rows, 128]`, so that a panel is one contiguous stream. The
canonical layout is read as it is; only the stream is less even.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lq_kernels.backend import Backend, PreparedMatrix, Problem, require
from lq_kernels.cpu.call import PANEL, X_TYPES, Operand, call
from lq_kernels.cpu.library import library, status
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import plane_widths, words_along

__all__ = ["BACKEND", "CpuConfig", "codebook_matmul", "status"]

BLOCKED = "blocked"
# Measured with AMX: at 4096 rows XLA's dot after unpacking takes a third of the time in bfloat16, half in float32. On a
# Zen 4 it is faster from 512 rows of bfloat16 on, and the C++ still at 2048 of float32 (1.4 times).
MAX_ROWS_FLOAT32, MAX_ROWS_HALF = 512, 256


@dataclasses.dataclass(frozen=True)
class CpuConfig:
    threads: int = 0  # of XLA's pool; 0: all of them. The result is the same to the bit
    isa: str | None = None  # "amx", "avx512_vnni", "avx512", "avx2", "neon", "plain"; None: the best there is

    def __post_init__(self):
        require(self, "threads", type(self.threads) is int and 0 <= self.threads < 1 << 31, "0 for all, or a number")
        there = library().supported
        require(self, "isa", self.isa is None or self.isa in there, f"one of {', '.join(there) or 'none'}, or None")


def codebook_matmul(
    x: Array,
    planes: tuple[Array, ...],
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    config: CpuConfig | None = None,
    out_dtype=None,
) -> Array:
    """y = x @ (codebook[code] * scale): NormalFloat and any other table of up to 16 numbers.

    Args:
      x: `[M, K]`, float32, bfloat16 or float16.
      planes: uint32 `[words, N]`, as `lq_kernels.pack(codes, bits)` returns them.
      scales: float `[groups, N]`.
      codebook: float `[2**bits]`.
      bits: 1 to 4.
      group_size: input channels that share a scale: a multiple of 32, or K and more for one scale a column.
      out_dtype: x's when None.

    Returns:
      `[M, N]`, accumulated in float32.

    Reference: Dettmers et al., QLoRA, 2023, arXiv:2305.14314, for NF4.
    """
    if not 1 <= bits <= 4:
        raise ValueError(f"a codebook has codes of 1 to 4 bits, not {bits}")
    planes_needed = [words_along(x.shape[1], width) for width in plane_widths(bits)]
    if [plane.shape[0] for plane in planes] != planes_needed:
        rows = [plane.shape[0] for plane in planes]
        raise ValueError(
            f"codes of {bits} bits of {x.shape[1]} channels are planes of {planes_needed} words, got {rows}"
        )
    if codebook.shape != (1 << bits,):
        raise ValueError(f"codes of {bits} bits need {1 << bits} numbers, got a codebook of shape {codebook.shape}")
    if reason := _refuses_group(group_size, x.shape[1]) or library().reason:
        raise NotImplementedError(f"cpu: {reason}")
    config = config or CpuConfig()
    table = jnp.zeros(16, jnp.float32).at[: 1 << bits].set(codebook.astype(jnp.float32))
    segment = Operand(planes, scales, None, 0.0, bits, group_size, x.shape[1])
    return call(
        x,
        [segment],
        out_features=scales.shape[1],
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        prepared=False,
        codebook=table,
        isa=config.isa,
        threads=config.threads,
    )


def _refuses_group(group_size: int, in_features: int) -> str | None:
    if group_size % 32 and group_size < in_features:
        return f"groups of {group_size} channels: multiples of 32 are served, and one group a column"
    return None


def _refuses(problem: Problem) -> str | None:
    if reason := library().reason:
        return reason
    for dtype in (problem.x_dtype, problem.out_dtype):
        if dtype not in X_TYPES:
            return f"{dtype}: {', '.join(X_TYPES)} are served"
    reasons = (_refuses_group(s.group_size, s.in_features) for s in problem.segments)
    return next(filter(None, reasons), None)


def _declines(problem: Problem) -> str | None:
    most = MAX_ROWS_FLOAT32 if problem.x_dtype == "float32" else MAX_ROWS_HALF
    if problem.rows > most:
        return f"more than {most} rows of {problem.x_dtype}: plain XLA is faster"
    return None


def _prepare(segments: tuple[PackedMatrix, ...], target: str) -> tuple[PackedMatrix, ...]:
    """Every array `[..., rows, N]` of every segment as panels `[N/128, rows, 128]`, columns padded with zeros."""
    return segments if target == "canonical" else jax.tree.map(_panels, segments)


def _panels(array: Array) -> Array:
    rows, N = array.shape
    padded = jnp.pad(array, ((0, 0), (0, -N % PANEL)))
    return padded.reshape(rows, -1, PANEL).swapaxes(0, 1)


def _restore(w: PreparedMatrix) -> tuple[PackedMatrix, ...]:
    if w.target == "canonical":
        return w.arrays
    columns = lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1)[:, : w.out_features]  # noqa: E731
    return jax.tree.map(columns, w.arrays)


def _matmul(x: Array, w: PreparedMatrix, *, out_dtype, config: CpuConfig, interpret: bool = False) -> Array:
    fields = [f.name for f in dataclasses.fields(Operand)]
    return call(
        x,
        [Operand(**{name: getattr(segment, name) for name in fields}) for segment in w.arrays],
        out_features=w.out_features,
        out_dtype=out_dtype,
        prepared=w.target == BLOCKED,
        isa=config.isa,
        threads=config.threads,
    )


BACKEND = Backend(
    name="cpu",
    platforms=("cpu",),
    refuses=_refuses,
    declines=_declines,
    target=lambda device_kind: BLOCKED,
    target_in_call=lambda device_kind: "canonical",
    prepare=_prepare,
    restore=_restore,
    matmul=_matmul,
    config_type=CpuConfig,
    default_config=lambda problem, target: CpuConfig(),
    candidates=lambda problem, target: [CpuConfig(threads=threads) for threads in (0, 1)],
)
