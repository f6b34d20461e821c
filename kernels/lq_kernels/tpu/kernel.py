"""The kernel: y = sum over segments of x @ ((code - zero) * scale), one strip of output channels per grid step.

The words of a strip are read whole along the input channels, so no partial sum leaves the chip, x is fetched once, and
segments of different widths are consecutive loops of one kernel. Each loop step unpacks a few chunks (`fields`) and
multiplies every group by itself: bfloat16 x bfloat16 products are exact, sums are float32, the group's scale is applied
to the sum. What the unpacked number is off from code - zero is subtracted once per strip, as the product of the sums of
x over each group with scale * (zero + offset).

Many rows: the grid's inner axis runs over blocks of rows, a block's turns share their code, and the first turn leaves
the unpacked strip in VMEM for the others. Within a turn, as many sums as registers hold run over all input channels.
Where the matrix unit is deeper than a group, weights may be scaled before the dot (`TpuConfig.scaled`).
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lq_kernels.tpu.fields import CHUNK, TILE_ROWS, Scheme, unpack_bytes, unpack_tile
from lq_kernels.tpu.layout import LANES
from lq_kernels.tpu.plan import Operands, Plan, Strip


def multiply(x: Array, sums: tuple, arrays: tuple[dict, ...], plan: Plan, out_dtype, interpret) -> Array:
    """x `[M, Kp]` bfloat16 or int8, sums per segment: bfloat16 terms `[M, 3 * Gp]` or None -> `[M, Np]`."""
    rows, width = x.shape[0], arrays[0]["scales"].shape[1]
    grid = (pl.cdiv(width, plan.columns), pl.cdiv(rows, plan.rows))
    operands, specs = [x], [pl.BlockSpec((plan.rows, x.shape[1]), lambda j, i: (i, 0))]
    strip_spec = lambda a: pl.BlockSpec((a.shape[0], plan.columns), lambda j, i: (0, j))  # noqa: E731
    for total, a in zip(sums, arrays, strict=True):
        if total is not None:
            operands.append(total)
            specs.append(pl.BlockSpec((plan.rows, total.shape[1]), lambda j, i: (i, 0)))
        for array in (*a["words"], a["scales"], *([] if a["zeros"] is None else [a["zeros"]])):
            operands.append(array)
            specs.append(strip_spec(array))
    scratch = [pltpu.VMEM((plan.rows, plan.columns) if len(plan.strips) > 1 else (8, 128), jnp.float32)]
    tiles = plan.columns // plan.tile[1]
    for s in plan.strips:
        scratch += [pltpu.VMEM((tiles, s.groups, plan.tile[1]), jnp.float32)] * (2 if plan.shifted(s) else 1)
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
    sides = [(scratch.pop(0), scratch.pop(0) if plan.shifted(strip) else None) for strip in plan.strips]
    last = len(plan.strips) - 1
    for i, strip in enumerate(plan.strips):
        o = Operands(*operands[i], *sides[i], scratch[i] if plan.keep else None)
        _spread(o, strip, plan)
        _strip(x_ref, o, acc_ref if i else None, acc_ref if i < last else out_ref, strip, plan)


def _spread(o: Operands, strip: Strip, plan: Plan):
    """Scales to where single rows of them can be read, as the unpacked numbers need them.

    For weights that are scaled as bfloat16, two of it in each word: eight equal rows are sixteen of bfloat16 then.
    """
    scale = o.scales[...].astype(jnp.float32)
    scale = scale if strip.multiple == 1 or _plain(strip, plan) else scale * (1 / strip.multiple)
    pairs = [(o.scale, scale)]
    if o.shift is not None:
        pairs.append((o.shift, (o.zeros[...].astype(jnp.float32) + strip.offset) * strip.multiple))
    for ref, values in pairs:
        if plan.prescaled(strip) and _narrow(o, strip):
            bits = lax.bitcast_convert_type(values, jnp.int32)
            bits |= lax.shift_right_logical(bits, jnp.full(bits.shape, 16, jnp.int32))
            values = lax.bitcast_convert_type(bits, jnp.float32)
        for t in range(ref.shape[0]):
            ref[t] = values[:, t * plan.tile[1] : (t + 1) * plan.tile[1]]


def _narrow(o: Operands, strip: Strip) -> bool:
    """Whether bfloat16 holds scales and codes minus zeros."""
    return strip.whole_zeros and o.scales.dtype == jnp.bfloat16


def _strip(x_ref, o: Operands, before, after, strip: Strip, plan: Plan):
    """after = before + x @ weights of one segment: tile columns, and turns of rows, one after the other.

    The first turn of the first block of rows unpacks, and leaves what the others read.
    """
    turns, tiles = plan.rows // plan.turn, plan.columns // plan.tile[1]

    def turn(i, tile, unpacked: bool):
        start = i if isinstance(i, int) and i == 0 else pl.multiple_of(i * plan.turn, 16)
        _turn(start, tile, unpacked, x_ref, o, before, after, strip, plan)

    def block(unpacked: bool):
        def of_tile(tile):
            if not unpacked:
                turn(0, tile, False)
            _loop(0 if unpacked else 1, turns, lambda i: turn(i, tile, plan.keep))

        _loop(0, tiles, of_tile)

    if plan.keep and plan.blocks > 1:
        pl.when(pl.program_id(1) == 0)(lambda: block(False))
        pl.when(pl.program_id(1) > 0)(lambda: block(True))
    else:
        block(False)


def _loop(start: int, stop: int, body):
    if stop - start > 1:
        lax.fori_loop(0, stop - start, lambda i, _: body(i + start) or 0, 0)
    elif stop > start:
        body(start)


def _turn(start, tile, unpacked: bool, x_ref, o: Operands, before, after, strip: Strip, plan: Plan):
    """One tile of registers below the other, each over all input channels of the segment.

    Where this turn unpacks, every tile does: the compiler would hold what it just stored in registers, and spill them.
    """
    width = plan.tile[1]
    columns = pl.ds(tile if isinstance(tile, int) and tile == 0 else pl.multiple_of(tile * width, LANES), width)
    for top in range(0, plan.turn, plan.tile[0]):
        rows = pl.ds(start + top, min(plan.tile[0], plan.turn - top))
        read, write = unpacked, plan.keep and not unpacked and top == 0
        total = _accumulate(x_ref, rows, columns, tile, read, write, o, strip, plan)
        if o.sums is not None:
            total -= _correction(o, rows, columns, strip, plan)
        if before is not None:
            total += before[rows, columns]
        after[rows, columns] = total.astype(after.dtype)


def _correction(o: Operands, rows, columns, strip: Strip, plan: Plan) -> Array:
    """sum over groups of (sum of x) * scale * (zero + offset), both factors as bfloat16 terms that are exact together.

    A dot of float32 operands costs six passes of the matrix unit; the terms of the sums lie along one depth.
    """
    factor = o.scales[:, columns].astype(jnp.float32)
    if o.zeros is not None:
        factor = factor * (o.zeros[:, columns].astype(jnp.float32) + plan.offset(strip))
    exact = o.zeros is None and o.scales.dtype == jnp.bfloat16  # the other factor, a constant, is in the sums
    repeated = jnp.concatenate([factor] * (o.sums.shape[1] // factor.shape[0]), axis=0)
    factors = [repeated.astype(jnp.bfloat16)] if exact else _terms(repeated)
    dots = [jnp.dot(o.sums[rows, :], f, preferred_element_type=jnp.float32) for f in reversed(factors)]
    return functools.reduce(operator.add, dots)


def _terms(a: Array) -> list[Array]:
    terms, rest = [], a
    for _ in range(3):
        terms.append(rest.astype(jnp.bfloat16))
        rest = rest - terms[-1].astype(jnp.float32)
    return terms


def _plain(strip: Strip, plan: Plan) -> bool:
    """Whether the kernel multiplies the codes as they are, no offset and no multiple."""
    return plan.integer and not strip.schemes[0].signed


def _accumulate(x_ref, rows, columns, tile, read: bool, write: bool, o: Operands, strip: Strip, plan: Plan) -> Array:
    """x[rows] @ (unpacked * scale)[:, columns] of a segment, chunk by chunk, reading or writing what is kept."""
    size = min(strip.group_size or CHUNK, CHUNK)
    prescaled = plan.prescaled(strip)

    def weights(chunk, part):
        if read:
            return o.kept[part, chunk, :, columns]
        w = _unpack(o.words[part], chunk, columns, strip.schemes[part], plan.integer)
        w = _prescale(w, chunk, tile, o, strip) if prescaled else w
        if write:
            o.kept[part, chunk, :, columns] = w
        return w

    def chunk_sum(chunk, acc):
        start = pl.multiple_of((strip.first_chunk + chunk) * CHUNK, CHUNK)
        parts = [weights(chunk, part) for part in range(len(strip.schemes))]
        x = x_ref[rows, pl.ds(start, CHUNK)]
        if prescaled:
            return acc + _dot(x, parts[0])
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
        return acc + total * o.scale[tile, pl.ds(row, 1), :]

    def step(i, acc):
        for j in range(plan.unroll):
            acc = chunk_sum(i * plan.unroll + j, acc)
        return acc

    whole = strip.chunks // plan.unroll
    acc = jnp.zeros((rows.size, columns.size), jnp.float32)
    acc = lax.fori_loop(0, whole, step, acc) if whole > 1 else step(0, acc) if whole else acc
    for chunk in range(whole * plan.unroll, strip.chunks):
        acc = chunk_sum(chunk, acc)
    return acc * o.scale[tile, 0:1, :] if strip.group_size is None else acc


def _prescale(w: Array, chunk, tile, o: Operands, strip: Strip) -> Array:
    """(code - zero) * scale of one chunk `[256, C]`, rounded once, to bfloat16.

    In bfloat16 throughout where it holds code - zero and scale exactly, else in float32.
    """
    narrow, size = _narrow(o, strip), strip.group_size or CHUNK
    off = 0.0 if strip.zero_point is None else strip.zero_point + strip.offset
    dtype = jnp.bfloat16 if narrow else jnp.float32

    def row(ref, group):
        values = ref[tile, pl.ds(chunk * (CHUNK // size) + group, 1), :]
        return pltpu.bitcast(jnp.broadcast_to(values, (TILE_ROWS, values.shape[1])), dtype) if narrow else values

    parts = []
    for group in range(CHUNK // size):
        part = w[group * size : (group + 1) * size].astype(dtype).reshape(size // 16, 16, -1)
        if o.shift is not None:
            part = part - row(o.shift, group)
        elif off:
            part = part - jnp.asarray(off * strip.multiple, dtype)
        parts.append((part * row(o.scale, group)).astype(jnp.bfloat16).reshape(size, -1))
    return jnp.concatenate(parts, axis=0)


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


def _unpack(words_ref, chunk, columns, s: Scheme, integer: bool) -> Array:
    """Some columns of one chunk `[256, C]`, as bfloat16 or int8."""
    start = chunk * s.words
    start = start if isinstance(start, int) else pl.multiple_of(start, TILE_ROWS)
    tiles = [words_ref[pl.ds(start + TILE_ROWS * t, TILE_ROWS), columns] for t in range(s.stored_tiles)]
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
