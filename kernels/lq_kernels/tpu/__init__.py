"""Backend `mosaic_tpu`: Pallas Mosaic TPU kernels for TPU v4, v5e, v5p, v6e and v7x.

`fields` says how codes lie in words and come out of them, `layout` lays a matrix out so, `kernel` multiplies, `config`
decides how a product is cut. This file ties them to the interface of a backend.

Numerics: unpacked numbers are whole and exact in bfloat16, products are exact, sums are float32 over a group (at most
256 products), scaled and added up in float32. float32 and float16 activations come as several bfloat16 terms. Where the
unpacked number is not code - zero but 2**bits + code, the difference is removed by a product of sums of x over groups:
the error then is relative to 2**bits too, a handful of float32 roundings of the exact result.

`TpuConfig(scaled=True)`, the default where 256 rows of bfloat16 or more give bfloat16 on v6e and v7x, multiplies the
weights of groups shorter than the matrix unit is deep by their scales first: each is rounded to bfloat16, by 2**-9 of
itself at most, zero points being taken off exactly before.

`TpuConfig(activations="digits")`, the default up to 4 rows of bfloat16 on chips whose matrix unit multiplies int8,
splits each row of x into four rows of int8 digits. Sums over a group are integers then, and exact.

`TpuConfig(activations="int8")` rounds x to 8 bits with one scale per row and multiplies integers, on chips whose matrix
unit does; it is never chosen by default.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from lq_kernels.backend import Backend, PreparedMatrix, Problem, uneven
from lq_kernels.packed import PackedMatrix
from lq_kernels.split import bf16_terms, sum_terms
from lq_kernels.tpu import layout
from lq_kernels.tpu.config import DIGITS, INTEGER_UNITS, TpuConfig, candidates, default_config, fits, tile, vmem_limit
from lq_kernels.tpu.fields import CHUNK
from lq_kernels.tpu.layout import LANES, padded, padded_groups, schemes, target_of
from lq_kernels.tpu.plan import Plan, Strip


def refuses(problem: Problem) -> str | None:
    if reason := uneven(problem.segments):
        return reason
    for s in problem.segments:
        if s.group_size not in (32, 64, 128) and s.group_size % CHUNK and s.group_size < s.in_features:
            return f"groups of {s.group_size}: needs 32, 64, 128, a multiple of {CHUNK}, or the whole column"
        if s.scale_dtype not in ("bfloat16", "float16", "float32"):
            return f"scales of {s.scale_dtype}: needs bfloat16, float16 or float32"
    target = target_of(problem.device_kind)
    if not fits(problem, target, default_config(problem, target)):
        return f"{problem.in_features} input channels: a strip of {LANES} output channels does not fit VMEM"
    return None


def matmul(x: Array, w: PreparedMatrix, *, out_dtype, config: TpuConfig, interpret=False) -> Array:
    """x `[M, K]` @ w as `out_dtype` `[M, N]`. See `Backend`."""
    from lq_kernels.tpu.kernel import multiply

    generation = w.target.partition("-")[0]
    integer = config.activations in ("int8", "digits")
    if integer and generation not in INTEGER_UNITS:
        raise NotImplementedError(f"{generation} has no integer matrix unit; use activations='bfloat16'")
    x_scale = None
    split = {"int8": quantize_rows, "digits": digits}.get(config.activations)
    terms, x_scale = split(x) if split else (bf16_terms(x), jnp.float32(1))
    rows = terms.shape[0]
    plan = _plan(w, rows, config, generation, integer)
    if plan.rows > rows:
        terms = jnp.pad(terms, ((0, plan.rows - rows), (0, 0)))
    sums = tuple(
        _group_sums(terms, strip, segment, start, plan) if plan.corrected(strip) else None
        for strip, segment, start in zip(plan.strips, w.segments, _starts(w.segments), strict=True)
    )
    direct = out_dtype if integer is False and rows == x.shape[0] and _storable(out_dtype) else jnp.float32
    y = multiply(_pad_segments(terms, w, plan), sums, w.arrays, plan, direct, interpret)[:rows, : w.out_features]
    y = sum_terms(y * x_scale, x.shape[0]) if direct == jnp.float32 else y
    return y.astype(out_dtype)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """x `[M, K]` as int8, its scale `[M, 1]` float32: abs-max over 127. A NaN or Inf makes its row NaN."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = jnp.where(top == 0, 1.0, top / 127)
    return jnp.round(jnp.nan_to_num(x / scale)).astype(jnp.int8), jnp.where(jnp.isfinite(top), scale, jnp.nan)


def digits(x: Array) -> tuple[Array, Array]:
    """x `[M, K]` as four digits to the base 128, largest first, int8 `[4 * M, K]`, and places' values `[4 * M, 1]`.

    They add up to x but for 2**-28 of the power of two above the row's largest number: every bfloat16 exactly that is
    not 2**-20 times smaller. A NaN or Inf makes its row NaN.
    """
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    finite = jnp.isfinite(top)
    _, exponent = jnp.frexp(jnp.where(finite & (top > 0), top, 1.0))
    rest = jnp.where(finite, jnp.ldexp(x, -exponent), 0.0) * 0.5
    found, places = [], []
    for i in range(DIGITS):
        rest = rest * 128
        digit = jnp.round(rest)
        rest = rest - digit
        found.append(digit.astype(jnp.int8))
        places.append(jnp.where(finite, jnp.ldexp(2.0, exponent - 7 * (i + 1)), jnp.nan))
    return jnp.concatenate(found), jnp.concatenate(places)


def _storable(dtype) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)


def _starts(segments) -> list[int]:
    return [sum(s.in_features for s in segments[:i]) for i in range(len(segments))]


def _plan(w: PreparedMatrix, rows: int, config: TpuConfig, generation: str, integer: bool) -> Plan:
    strips, first = [], 0
    for s in w.segments:
        parts, chunks = schemes(s.bits, w.target), padded(s.in_features, CHUNK) // CHUNK
        size = None if s.group_size >= s.in_features else s.group_size
        whole = "int" in str(s.zero_dtype) if s.asymmetric else s.zero_point in range((1 << s.bits) + 1)
        zero_point = None if s.asymmetric else s.zero_point
        strips.append(Strip(parts, chunks, size, padded_groups(s), first, zero_point, whole))
        first += chunks
    # A block of several turns is whole turns of rows, for which x is padded; one of a single turn ends where x does.
    block = config.rows if config.rows > config.turn and rows > config.turn else min(config.rows, rows)
    columns = min(config.columns, padded(w.out_features, LANES))
    return Plan(
        strips=tuple(strips),
        rows=block,
        columns=columns,
        turn=config.turn if block % config.turn == 0 else block,
        tile=tile(config, block, columns, generation),
        blocks=-(-rows // block),
        unroll=config.unroll,
        depth=config.depth,
        keep=config.keep,
        scaled=config.scaled,
        integer=integer,
        vmem_limit=vmem_limit(generation),
    )


def _group_sums(x: Array, strip, segment, start: int, plan) -> Array:
    """Sums of x over each group of a segment `[M, 3 * Gp]`: three bfloat16 terms, one beside the other.

    Times what is to be subtracted from every unpacked number where that is one number for the whole segment.
    """
    own = x[:, start : start + segment.in_features]
    size = min(segment.group_size, segment.in_features)
    whole = segment.groups * size
    own = jnp.pad(own, ((0, 0), (0, whole - segment.in_features))).reshape(x.shape[0], segment.groups, size)
    sums = own.sum(-1, dtype=jnp.float32)
    sums = jnp.pad(sums, ((0, 0), (0, strip.groups - segment.groups)))
    if strip.zero_point is not None:
        sums = sums * (strip.zero_point + plan.offset(strip))
    return bf16_terms(sums).reshape(3, x.shape[0], -1).swapaxes(0, 1).reshape(x.shape[0], -1)


def _pad_segments(x: Array, w: PreparedMatrix, plan) -> Array:
    """Every segment's channels padded with zeros to whole chunks, and in the order that integer unpacking leaves."""
    parts = []
    for strip, segment, start in zip(plan.strips, w.segments, _starts(w.segments), strict=True):
        part = x[:, start : start + segment.in_features]
        part = jnp.pad(part, ((0, 0), (0, strip.chunks * CHUNK - segment.in_features)))
        if plan.integer and strip.schemes[0].container == 16:
            part = _interleave(part)
        parts.append(part)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _interleave(x: Array) -> Array:
    """int8 `[M, K]`, of every 32 channels the first 16 between the last 16.

    As a product with a permutation of 128 channels: moving them pair by pair makes arrays that a TPU pads manifold.
    """
    order = np.arange(LANES).reshape(-1, 2, 16).swapaxes(1, 2).reshape(-1)
    permutation = jnp.asarray(np.arange(LANES)[:, None] == order[None, :], jnp.int8)
    blocks = x.reshape(x.shape[0], -1, LANES)
    return (
        jnp.einsum("mbk,kn->mbn", blocks, permutation, preferred_element_type=jnp.int32)
        .astype(jnp.int8)
        .reshape(x.shape)
    )


def restore(w: PreparedMatrix) -> tuple[PackedMatrix, ...]:
    return layout.restore(w.arrays, w.segments, w.out_features, w.target)


BACKEND = Backend(
    name="mosaic_tpu",
    platforms=("tpu",),
    refuses=refuses,
    target=target_of,
    target_in_call=target_of,
    prepare=layout.prepare,
    restore=restore,
    matmul=matmul,
    config_type=TpuConfig,
    default_config=default_config,
    candidates=candidates,
)
