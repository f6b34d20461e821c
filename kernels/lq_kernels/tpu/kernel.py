"""The kernel: y = sum over segments of x @ ((code - zero) * scale), one strip of output channels per grid step.

The words of a strip are read whole along the input channels, so no partial sum leaves the chip, x is fetched once, and
segments of different widths are consecutive loops of one kernel. Each loop step unpacks a few chunks (`fields`) and
multiplies every group by itself: bfloat16 x bfloat16 products are exact, sums are float32, the group's scale is applied
to the sum. What the unpacked number is off from code - zero is subtracted once per strip, as the product of the sums of
x over each group with scale * (zero + offset).

Many rows: the grid's inner axis runs over blocks of rows; the first of them leaves the unpacked strip in VMEM for the
others.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lq_kernels.tpu.fields import CHUNK, TILE_ROWS, Scheme, unpack_bytes, unpack_tile
from lq_kernels.tpu.layout import padded


@dataclasses.dataclass(frozen=True)
class Strip:
    """What the kernel knows of one segment."""

    schemes: tuple[Scheme, ...]
    chunks: int
    group_size: int | None  # None: one scale for the whole column
    groups: int  # rows of scales
    first_chunk: int  # of x
    zero_point: float | None  # None: zeros are stored

    @property
    def offset(self) -> int:
        """What the unpacked numbers, over `multiple`, exceed the codes by."""
        return sum(16**i * s.offset for i, s in enumerate(self.schemes))

    @property
    def multiple(self) -> int:
        return self.schemes[0].multiple


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static of a call."""

    strips: tuple[Strip, ...]
    rows: int  # of a block of x
    columns: int  # of a strip
    unroll: int  # chunks per loop step
    depth: int  # input channels of a dot; the groups in it share one, each with its own rows of x
    keep: bool  # the unpacked strip, for the blocks of rows that follow
    integer: bool  # x is int8, products are summed in int32
    vmem_limit: int

    def offset(self, strip: Strip) -> int:
        if self.integer and not strip.schemes[0].signed:
            return 0
        return strip.offset

    def corrected(self, strip: Strip) -> bool:
        return strip.zero_point is None or strip.zero_point + self.offset(strip) != 0


def multiply(x: Array, sums: tuple, arrays: tuple[dict, ...], plan: Plan, out_dtype, interpret) -> Array:
    """x `[M, Kp]` bfloat16 or int8, sums per segment: bfloat16 terms `[3, Mp, Gp]` or None -> `[M, Np]`."""
    rows, width = x.shape[0], arrays[0]["scales"].shape[1]
    grid = (pl.cdiv(width, plan.columns), pl.cdiv(rows, plan.rows))
    operands, specs = [x], [pl.BlockSpec((plan.rows, x.shape[1]), lambda j, i: (i, 0))]
    strip_spec = lambda a: pl.BlockSpec((a.shape[0], plan.columns), lambda j, i: (0, j))  # noqa: E731
    for total, a in zip(sums, arrays, strict=True):
        if total is not None:
            operands.append(total)
            specs.append(pl.BlockSpec((total.shape[0], padded(plan.rows, 16), total.shape[2]), lambda j, i: (0, i, 0)))
        for array in (*a["words"], a["scales"], *([] if a["zeros"] is None else [a["zeros"]])):
            operands.append(array)
            specs.append(strip_spec(array))
    scratch = [pltpu.VMEM((plan.rows, plan.columns), jnp.float32)]
    scratch += [pltpu.VMEM((s.groups, plan.columns), jnp.float32) for s in plan.strips]
    if plan.keep:
        dtype = jnp.int8 if plan.integer else jnp.bfloat16
        scratch += [pltpu.VMEM((len(s.schemes), s.chunks, CHUNK, plan.columns), dtype) for s in plan.strips]
    flops = 2 * rows * width * x.shape[1]
    moved = sum(math.prod(o.shape) * o.dtype.itemsize for o in operands) + rows * width * jnp.dtype(out_dtype).itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        name="lq_matmul",
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, width), out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(*operands)


def _kernel(x_ref, *refs, plan: Plan):
    refs = list(refs)
    operands = []
    for strip in plan.strips:
        sums = refs.pop(0) if plan.corrected(strip) else None
        words = [refs.pop(0) for _ in strip.schemes]
        scales = refs.pop(0)
        zeros = refs.pop(0) if strip.zero_point is None else None
        operands.append((sums, words, scales, zeros))
    out_ref, acc_ref, *scratch = refs
    scaled, kept = scratch[: len(plan.strips)], scratch[len(plan.strips) :] or [None] * len(plan.strips)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    for strip, (sums, words, scales, zeros), scale_ref, kept_ref in zip(
        plan.strips, operands, scaled, kept, strict=True
    ):
        scale = scales[...].astype(jnp.float32)
        scale_ref[...] = scale if strip.multiple == 1 or _plain(strip, plan) else scale * (1 / strip.multiple)
        if kept_ref is not None:

            @pl.when(pl.program_id(1) == 0)
            def _(strip=strip, words=words, kept_ref=kept_ref):
                _keep(words, kept_ref, strip, plan)

        _accumulate(x_ref, words, scale_ref, kept_ref, acc_ref, strip, plan)
        if sums is not None:
            acc_ref[...] -= _correction(sums, scales, zeros, strip, plan)
    out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def _correction(sums, scales, zeros, strip: Strip, plan: Plan) -> Array:
    """sum over groups of (sum of x) * scale * (zero + offset), both factors as bfloat16 terms that are exact together.

    A dot of float32 operands costs six passes of the matrix unit; the terms of the sums share one.
    """
    if zeros is None and scales.dtype == jnp.bfloat16:  # the factor, a constant, is in the sums
        factors = [scales[...]]
    else:
        zero = 0.0 if zeros is None else zeros[...].astype(jnp.float32) + plan.offset(strip)
        factor = scales[...].astype(jnp.float32)
        factors = _terms(factor if zeros is None else factor * zero)
    terms, rows, groups = sums.shape
    left = sums[...].reshape(terms * rows, groups)
    products = [jnp.dot(left, f, preferred_element_type=jnp.float32) for f in reversed(factors)]
    total = functools.reduce(operator.add, products).reshape(terms, rows, -1)
    return functools.reduce(operator.add, [total[i] for i in reversed(range(terms))])[: plan.rows]


def _terms(a: Array) -> list[Array]:
    terms, rest = [], a
    for _ in range(3):
        terms.append(rest.astype(jnp.bfloat16))
        rest = rest - terms[-1].astype(jnp.float32)
    return terms


def _plain(strip: Strip, plan: Plan) -> bool:
    """Whether the kernel multiplies the codes as they are, no offset and no multiple."""
    return plan.integer and not strip.schemes[0].signed


def _keep(words, kept_ref, strip: Strip, plan: Plan):
    def step(chunk, _):
        for part in range(len(strip.schemes)):
            kept_ref[part, chunk] = _unpack(words[part], chunk, strip.schemes[part], plan.integer)
        return 0

    lax.fori_loop(0, strip.chunks, step, 0)


def _accumulate(x_ref, words, scale_ref, kept_ref, acc_ref, strip: Strip, plan: Plan):
    """acc += x @ (unpacked * scale), chunk by chunk."""
    size = min(strip.group_size or CHUNK, CHUNK)

    def weights(chunk, part):
        if kept_ref is not None:
            return kept_ref[part, chunk]
        return _unpack(words[part], chunk, strip.schemes[part], plan.integer)

    def chunk_sum(chunk, acc):
        start = pl.multiple_of((strip.first_chunk + chunk) * CHUNK, CHUNK)
        parts = [weights(chunk, part) for part in range(len(strip.schemes))]
        x = x_ref[:, pl.ds(start, CHUNK)]
        depth = max(size, plan.depth)
        for first in range(0, CHUNK, depth):
            inside = slice(first, first + depth)
            grouped = _by_group(x[:, inside], size)
            dots = [_dot(grouped, w[inside]) for w in parts]
            total = functools.reduce(operator.add, [16.0**i * dot if i else dot for i, dot in enumerate(dots)])
            for g in range(depth // size):
                acc = scaled(acc, chunk, first // size + g, total[g * x.shape[0] : (g + 1) * x.shape[0]])
        return acc

    def scaled(acc, chunk, group, total):
        if strip.group_size is None:
            return acc + total
        row = chunk * (CHUNK // size) + group if size < CHUNK else chunk // (strip.group_size // CHUNK)
        return acc + total * scale_ref[pl.ds(row, 1), :]

    whole = strip.chunks // plan.unroll
    acc = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(i, acc):
        for j in range(plan.unroll):
            acc = chunk_sum(i * plan.unroll + j, acc)
        return acc

    if whole > 1:
        acc = lax.fori_loop(0, whole, step, acc)
    elif whole:
        acc = step(0, acc)
    for chunk in range(whole * plan.unroll, strip.chunks):
        acc = chunk_sum(chunk, acc)
    acc_ref[...] += acc * scale_ref[0:1, :] if strip.group_size is None else acc


def _by_group(x: Array, size: int) -> Array:
    """x `[M, L]` below itself, once for each group of `size` channels, zero outside that group."""
    groups = x.shape[1] // size
    if groups == 1:
        return x
    of = lax.broadcasted_iota(jnp.int32, x.shape, 1) >> (size.bit_length() - 1)
    return jnp.concatenate([jnp.where(of == g, x, jnp.zeros_like(x)) for g in range(groups)], axis=0)


def _dot(x: Array, w: Array) -> Array:
    if w.dtype == jnp.int8:
        return jnp.dot(x, w, preferred_element_type=jnp.int32).astype(jnp.float32)
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def _unpack(words_ref, chunk, s: Scheme, integer: bool) -> Array:
    """One chunk `[256, N]`, as bfloat16 or int8."""
    start = chunk * s.words
    start = start if isinstance(start, int) else pl.multiple_of(start, TILE_ROWS)
    tiles = [words_ref[pl.ds(start + TILE_ROWS * t, TILE_ROWS), :] for t in range(s.stored_tiles)]
    if s.container == 16 and not integer:
        return jnp.concatenate(
            [pltpu.bitcast(unpack_tile(tiles, s, i), jnp.bfloat16) for i in range(len(s.pieces))], axis=0
        )
    if s.container == 16:
        return jnp.concatenate(
            [pltpu.bitcast(unpack_bytes(tiles, s, i), jnp.int8) for i in range(len(s.pieces) // 2)], axis=0
        )
    narrow = jnp.concatenate([unpack_tile(tiles, s, i) for i in range(len(s.pieces))], axis=0)
    narrow = pltpu.bitcast(narrow, jnp.int8 if s.container == 8 else jnp.int4)
    wanted = jnp.int8 if integer else jnp.bfloat16
    return narrow if narrow.dtype == wanted else narrow.astype(wanted)
