"""How one launch is cut into stages, units and thread blocks.

A *unit* is a strip of channels times a tile of tokens, all its stages. Thread blocks are persistent. With `split` each
takes an equal share of all stages of all units, wherever that cuts (stream-K); what a block contributes to a unit goes
to a plane of its own, in the order of the blocks, so that the sum over planes is always the same. Without, units go
round robin, tokens first: blocks that run together read the same weights. They may then form clusters, neighbouring
strips of one tile of tokens, which fetch its x once and multicast it: each block alone would ask more of the
level-2 cache than it gives.
"""

import dataclasses

import numpy as np

from lq_kernels.gpu.layout import StreamSegment

SIDES = 2  # warpgroups that share a stage: 64 channels each


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is static about one launch."""

    segments: tuple[StreamSegment, ...]
    stage_tiles: tuple[int, ...]  # tiles of a stage, per segment; divides the segment's tiles
    strips: int
    rows: int  # of x, padding left out
    token_tile: int
    pairs: int
    slots: int  # a multiple of `pairs`: a warpgroup must see every turn of the slots that it waits for
    blocks: int  # thread blocks
    cluster: int  # of them, 1 or 2, share x; divides `strips` and `blocks`, and is 1 with `split`
    split: bool
    out_dtype: str
    interpret: object = None

    @property
    def token_tiles(self) -> int:
        return -(-self.rows // self.token_tile)

    @property
    def out_rows(self) -> int:
        """Rows that a unit writes: of a lone tile of tokens, no padding."""
        return min(self.rows, self.token_tile)

    @property
    def computing(self) -> int:
        """Warpgroups that multiply."""
        return SIDES * self.pairs

    @property
    def span(self) -> int:
        """Input channels per swizzled row of x in shared memory: no more than the smallest group."""
        return min(64, *(s.group for s in self.segments))

    @property
    def slot_rows(self) -> int:
        return max(s.rows * tiles for s, tiles in zip(self.segments, self.stage_tiles, strict=True))

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Of each segment, the stage after its last."""
        return tuple(
            int(n) for n in np.cumsum([s.tiles // t for s, t in zip(self.segments, self.stage_tiles, strict=True)])
        )

    @property
    def stages(self) -> int:
        """Of one unit."""
        return self.stage_ends[-1]

    @property
    def units(self) -> int:
        return self.strips * self.token_tiles

    @property
    def contributions(self) -> np.ndarray:
        """How many blocks contribute to each unit, [units]."""
        if not self.split:
            return np.ones(self.units, int)
        first = np.arange(self.units) * self.stages
        return self._block_of(first + self.stages - 1) - self._block_of(first) + 1

    def _block_of(self, stage):
        """The block that computes a stage, counted through all units."""
        return ((stage + 1) * self.blocks - 1) // (self.units * self.stages)

    @property
    def planes(self) -> int:
        return int(self.contributions.max())

    @property
    def warpgroup_registers(self) -> tuple[int, int]:
        """Registers of a thread that copies, and of one that computes.

        They share what the block gets when it is launched, the same for every thread; asking for more in all would
        wait for ever.
        """
        warpgroups = self.computing + 1
        launched = 65536 // (128 * warpgroups) // 8 * 8
        copying = 40 if self.pairs == 1 else 32
        return copying, (launched * warpgroups - copying) // self.computing // 8 * 8
