"""Everything static of one call of the TPU kernel, and the names of its arrays."""

import dataclasses
from typing import Any, NamedTuple

from lq_kernels.tpu.fields import CHUNK, Scheme


@dataclasses.dataclass(frozen=True)
class Strip:
    """What the kernel knows of one segment."""

    schemes: tuple[Scheme, ...]
    chunks: int
    group_size: int | None  # None: one scale for the whole column
    groups: int  # rows of scales
    first_chunk: int  # of x
    zero_point: float | None  # None: zeros are stored
    whole_zeros: bool = True  # code - zero is a whole number that bfloat16 holds

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
    columns: int  # of a strip, a multiple of the tile's
    turn: int  # rows of a block that one loop step multiplies
    tile: tuple[int, int]  # rows and columns of the sums that are in registers at a time
    blocks: int  # of rows
    unroll: int  # chunks per loop step
    depth: int  # input channels of a dot; the groups in it share one, each with its own rows of x
    keep: bool  # the unpacked strip, for the blocks of rows that follow
    scaled: bool  # groups shorter than a chunk are multiplied by their scales before the dot, and rounded
    integer: bool  # x is int8, products are summed in int32
    vmem_limit: int

    def offset(self, strip: Strip) -> int:
        if self.integer and not strip.schemes[0].signed:
            return 0
        return strip.offset

    def prescaled(self, strip: Strip) -> bool:
        short = strip.group_size is not None and strip.group_size < CHUNK
        return self.scaled and short and len(strip.schemes) == 1 and not self.integer

    def shifted(self, strip: Strip) -> bool:
        return self.prescaled(strip) and strip.zero_point is None

    def corrected(self, strip: Strip) -> bool:
        """Whether sums of x remove what the unpacked number is off by."""
        return not self.prescaled(strip) and (strip.zero_point is None or strip.zero_point + self.offset(strip) != 0)


class Operands(NamedTuple):
    """A segment's arrays within the kernel."""

    sums: Any  # of x over groups, bfloat16 terms `[rows, 3 * Gp]`, or None
    words: Any  # list of int32 `[chunks * words, columns]`
    scales: Any  # `[Gp, columns]`
    zeros: Any  # `[Gp, columns]` or None
    scale: Any  # float32 `[tiles, Gp, C]`, C columns a tile: read by rows at any place. See `_spread`
    shift: Any  # likewise, what to take off before, or None
    kept: Any  # `[words arrays, chunks, 256, columns]` unpacked weights, or None
