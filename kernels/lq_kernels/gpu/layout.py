"""The layout "sm90": a matrix as the stream of bytes that the kernel reads, and the way back.

A *strip* is 128 output channels, what one thread block multiplies; a *tile* is 128 input channels of a strip. Tiles lie
one after the other, each in rows of 64 words:

    8 bits rows of codes: first those of the strip's lower 64 channels (one warpgroup), then those of the upper
    then, for each group of the tile, rows of 2 x 32 words: scales, and zeros where there are any

so one contiguous copy brings everything that a few tiles need. The words of a warpgroup lie in the order in which its
128 threads read them, 16 bytes (8 for odd widths) to a thread; `fields` says what is inside. A thread's part of a tile
is that of the A operand of the matrix instruction: thread 32 w + 4 r + c has rows 16 w + r and 16 w + r + 8, and
input channels 8 f + 2 c and 8 f + 2 c + 1 for the fields f = 0..15. Input channels stay in their order.

Scales of bfloat16 are kept as such, two rows to a word; others are widened to float32. Zeros are bfloat16, exact for
whole numbers in [0, 2**bits], where zeros belong. Fractional zeros are split: their whole part is in the stream, and
the zeros themselves are kept beside it.

Groups of 128 or more (and a whole column) are stored once per tile: sums are never longer than 128 products before they
are added up in float32, which bounds what the tensor core's accumulator may lose.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lq_kernels.backend import Segment, segment_of
from lq_kernels.gpu.fields import FIELDS, fields
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import pack, unpack

TILE = 128  # input channels of a tile, output channels of a strip
ROW = 64  # words of a row of the stream


@dataclasses.dataclass(frozen=True)
class StreamSegment:
    """The static facts of one segment in the stream."""

    bits: int
    group: int  # input channels that share a scale inside a tile: 32, 64 or 128
    tiles: int
    wide_scales: bool  # float32, not bfloat16
    zeros: bool  # bfloat16 zeros are in the stream
    zero_point: float  # the constant, where they are not

    @property
    def vector(self) -> int:
        """Words a thread reads at once."""
        return 4 if self.bits % 2 == 0 else 2

    @property
    def groups(self) -> int:
        """Groups of a tile."""
        return TILE // self.group

    @property
    def code_rows(self) -> int:
        """Rows of codes of one warpgroup."""
        return 4 * self.bits

    @property
    def group_rows(self) -> int:
        """Rows of scales and zeros of one group."""
        return 1 + self.wide_scales + self.zeros

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 2 * self.code_rows + self.groups * self.group_rows


def stream_segment(segment: Segment) -> StreamSegment:
    return StreamSegment(
        bits=segment.bits,
        group=min(segment.group_size, TILE) if segment.group_size in (32, 64) else TILE,
        tiles=math.ceil(segment.in_features / TILE),
        wide_scales=segment.scale_dtype != "bfloat16",
        zeros=segment.asymmetric,
        zero_point=math.floor(segment.zero_point) if fractional(segment) else segment.zero_point,
    )


def fractional(segment: Segment) -> bool:
    """Whether code - zero may be no bfloat16 number, so that part of the zero is subtracted after the sum."""
    if segment.asymmetric:
        return not jnp.issubdtype(jnp.dtype(segment.zero_dtype), jnp.integer)
    exact = np.arange(2.0**segment.bits) - segment.zero_point
    return bool(np.any(exact != exact.astype(jnp.bfloat16).astype(np.float64)))


def prepare(segments: tuple[PackedMatrix, ...], target: str) -> tuple[dict[str, Array], ...]:
    """One dict per segment: `stream` int32 [strips, tiles * rows, 64]; `zeros`, only if they are of a float dtype."""
    del target
    return tuple(_prepare_segment(w) for w in segments)


def restore(arrays: tuple[dict[str, Array], ...], segments: tuple[Segment, ...], N: int) -> tuple[PackedMatrix, ...]:
    """The matrices that were prepared, bit for bit."""
    return tuple(_restore_segment(a, s, N) for a, s in zip(arrays, segments, strict=True))


def _prepare_segment(w: PackedMatrix) -> dict[str, Array]:
    facts, N = stream_segment(segment_of(w)), w.out_features
    strips = math.ceil(N / TILE)
    codes = unpack(w.planes, w.bits, w.in_features)
    codes = jnp.pad(codes, ((0, facts.tiles * TILE - w.in_features), (0, strips * TILE - N)))
    parts = [_words_of(codes, facts, strips).reshape(strips, facts.tiles, -1, ROW)]
    pairs = [_tile_groups(w.scales, w, facts, strips)]
    if facts.wide_scales:
        scales = lax.bitcast_convert_type(pairs[0].astype(jnp.float32), jnp.int32)
        planes = [scales[..., 0], scales[..., 1]]
    else:
        planes = [_pair(pairs[0])]
    if facts.zeros and w.zeros is not None:
        planes.append(_pair(_tile_groups(_whole_part(w.zeros), w, facts, strips).astype(jnp.bfloat16)))
    # [strips, tiles, groups, planes, 2 warpgroups, 32]
    parts.append(jnp.stack(planes, axis=3).reshape(strips, facts.tiles, -1, ROW))
    arrays = {"stream": jnp.concatenate(parts, axis=2).reshape(strips, facts.tiles * facts.rows, ROW)}
    if w.zeros is not None and fractional(segment_of(w)):
        arrays["zeros"] = w.zeros
    return arrays


def _restore_segment(arrays: dict[str, Array], segment: Segment, N: int) -> PackedMatrix:
    facts = stream_segment(segment)
    stream = arrays["stream"]
    strips = stream.shape[0]
    stream = stream.reshape(strips, facts.tiles, facts.rows, ROW)
    codes = _codes_of(stream[:, :, : 2 * facts.code_rows], facts, strips)[: segment.in_features, :N]
    planes = stream[:, :, 2 * facts.code_rows :].reshape(strips, facts.tiles, facts.groups, facts.group_rows, 2, 32)
    if facts.wide_scales:
        scales = lax.bitcast_convert_type(jnp.stack([planes[:, :, :, 0], planes[:, :, :, 1]], -1), jnp.float32)
    else:
        scales = lax.bitcast_convert_type(planes[:, :, :, 0], jnp.bfloat16)
    zeros = None
    if segment.asymmetric:
        zeros = arrays.get("zeros")
        if zeros is None:
            pair = lax.bitcast_convert_type(planes[:, :, :, facts.group_rows - 1], jnp.bfloat16)
            # By way of float32: XLA has no direct conversion of bfloat16 to some integer types on every platform.
            zeros = _from_tile_groups(pair, segment, N).astype(jnp.float32).astype(segment.zero_dtype)
    return PackedMatrix(
        planes=pack(codes, segment.bits),
        scales=_from_tile_groups(scales, segment, N).astype(segment.scale_dtype),
        zeros=zeros,
        zero_point=segment.zero_point,
        bits=segment.bits,
        group_size=segment.group_size,
        in_features=segment.in_features,
    )


def _whole_part(zeros: Array) -> Array:
    """The part of the zeros that is subtracted from the codes."""
    if jnp.issubdtype(zeros.dtype, jnp.integer):
        return zeros.astype(jnp.float32)
    return jnp.clip(jnp.floor(zeros.astype(jnp.float32)), 0, 255)


def zero_remainder(zeros: Array, bits: int) -> Array:
    """float32: what is left of fractional zeros."""
    return zeros.astype(jnp.float32) - _whole_part(zeros)


def _pair(rows: Array) -> Array:
    """bfloat16 [..., 2] -> int32 [...], the first in the low half."""
    return lax.bitcast_convert_type(rows, jnp.int32)


def _tile_groups(values: Array, w: PackedMatrix, facts: StreamSegment, strips: int) -> Array:
    """[groups, N] -> [strips, tiles, groups of a tile, 2 warpgroups, 32, 2 rows]; padding is 0."""
    count = facts.tiles * facts.groups
    if facts.group != w.group_size:  # a group of several tiles: repeated in each
        start = np.minimum(np.arange(count) * facts.group, w.in_features - 1)
        values = values[start // w.group_size]
    values = jnp.pad(values, ((0, count - values.shape[0]), (0, strips * TILE - values.shape[1])))
    values = values.reshape(facts.tiles, facts.groups, strips, 2, 4, 2, 8)
    return values.transpose(2, 0, 1, 3, 4, 6, 5).reshape(strips, facts.tiles, facts.groups, 2, 32, 2)


def _from_tile_groups(values: Array, segment: Segment, N: int) -> Array:
    facts = stream_segment(segment)
    strips = values.shape[0]
    values = values.reshape(strips, facts.tiles, facts.groups, 2, 4, 8, 2).transpose(1, 2, 0, 3, 4, 6, 5)
    values = values.reshape(facts.tiles * facts.groups, strips * TILE)
    first = np.arange(segment.groups) * segment.group_size // facts.group
    return values[first, :N]


def _words_of(codes: Array, facts: StreamSegment, strips: int) -> Array:
    """uint32 codes [tiles * 128, strips * 128] -> int32 [strips, tiles, 2 warpgroups, words]."""
    # k = tile, field, c, half; n = strip, warpgroup, warp, row, r
    codes = codes.reshape(facts.tiles, FIELDS, 4, 2, strips, 2, 4, 2, 8)
    words = []
    for j in range(facts.bits):
        word = jnp.zeros((), jnp.uint32)
        for f, field in enumerate(fields(facts.bits)):
            for piece in field.pieces:
                if piece.word == j:
                    part = (codes[:, f] >> piece.source) & ((1 << piece.width) - 1)
                    word |= (part[:, :, 0] << piece.at) | (part[:, :, 1] << (piece.at + 16))
        words.append(word)
    # [tile, c, strip, warpgroup, warp, row, r, word] -> [strip, tile, warpgroup, thread, row * words]
    words = jnp.stack(words, axis=-1).transpose(2, 0, 3, 4, 6, 1, 5, 7)
    words = words.reshape(strips, facts.tiles, 2, TILE, 2 * facts.bits // facts.vector, facts.vector)
    words = words.transpose(0, 1, 2, 4, 3, 5).reshape(strips, facts.tiles, 2, -1)
    return lax.bitcast_convert_type(words, jnp.int32)


def _codes_of(rows: Array, facts: StreamSegment, strips: int) -> Array:
    words = lax.bitcast_convert_type(rows, jnp.uint32)
    words = words.reshape(strips, facts.tiles, 2, 2 * facts.bits // facts.vector, TILE, facts.vector)
    words = words.transpose(0, 1, 2, 4, 3, 5).reshape(strips, facts.tiles, 2, 4, 8, 4, 2, facts.bits)
    words = words.transpose(1, 5, 0, 2, 3, 6, 4, 7)  # [tile, c, strip, warpgroup, warp, row, r, word]
    codes = []
    for field in fields(facts.bits):
        halves = []
        for half in (0, 16):
            parts = [((words[..., p.word] >> (p.at + half)) & ((1 << p.width) - 1)) << p.source for p in field.pieces]
            halves.append(sum(parts[1:], parts[0]))
        codes.append(jnp.stack(halves, axis=2))  # [tile, c, half, ...]
    return jnp.stack(codes, axis=1).reshape(facts.tiles * TILE, strips * TILE)
