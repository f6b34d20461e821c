"""How a product is cut for the device: the configuration, what is chosen without measurements, what a tuner may try.

Nothing here was measured: the rules follow from the sizes of shared memory and of the register file, and from counting
instructions (`bench/gpu_compile.py`).
"""

import dataclasses
import itertools
import math
import re

from lq_kernels.backend import Problem, require
from lq_kernels.gpu.layout import ROW, TILE, StreamSegment, stream_segment
from lq_kernels.split import TERMS

SHARED_BYTES = 227 * 1024 - 1024  # what a thread block may have, less the barriers
LARGEST_TOKEN_TILE = 128  # two accumulators of half as many registers fit beside the codes
TWO_PAIRS_TOKEN_TILE = 32  # with 120 registers a thread
CLUSTER_TOKEN_TILE = 64  # from here on x is most of what a block reads
MULTIPROCESSORS = {"H100 PCIe": 114, "H20": 78}  # other Hopper devices: 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Of one launch."""

    token_tile: int  # rows of x that share an unpacked weight: a multiple of 8, at most 128
    pairs: int  # of computing warpgroups: 1 or 2
    stage_bytes: int  # of codes, scales and zeros copied at once; at least one tile is
    slots: int  # stages in flight, a multiple of `pairs`
    blocks: int  # thread blocks; all are to run at once
    split: bool  # cut units of work between blocks, and sum the parts in a second pass
    cluster: int  # thread blocks that share x: 1, or 2 where work is not cut and N fills an even number of strips

    def __post_init__(self):
        tile = self.token_tile
        require(self, "token_tile", tile % 8 == 0 and 8 <= tile <= LARGEST_TOKEN_TILE, "8, 16 ... 128")
        require(self, "pairs", self.pairs in (1, 2), "1 or 2")
        for field in ("stage_bytes", "slots", "blocks"):
            require(self, field, getattr(self, field) >= 1, "1 or more")
        require(self, "cluster", self.cluster in (1, 2), "1 or 2")


def multiprocessors(device_kind: str | None) -> int:
    for name, count in MULTIPROCESSORS.items():
        if name in (kind := device_kind or "") and not re.search(r"H20\d", kind):
            return count
    return 132


def stage_tiles(segments: tuple[StreamSegment, ...], stage_bytes: int) -> tuple[int, ...]:
    """Tiles of a stage, per segment: the largest divisor of its tiles that fits, so that no stage is short."""
    return tuple(
        max(n for n in range(1, s.tiles + 1) if s.tiles % n == 0 and (n == 1 or _stage_fits(s, n, stage_bytes)))
        for s in segments
    )


def _stage_fits(segment: StreamSegment, tiles: int, stage_bytes: int) -> bool:
    # The hardware copies at most 256 rows at once.
    return tiles * segment.rows <= 256 and tiles * segment.rows * ROW * 4 <= stage_bytes


def shared_bytes(segments: tuple[StreamSegment, ...], config: GpuConfig, out_bytes: int) -> int:
    """Shared memory of a thread block, barriers left out."""
    return config.slots * _slot_bytes(segments, config) + TILE * config.token_tile * out_bytes


def _slot_bytes(segments: tuple[StreamSegment, ...], config: GpuConfig) -> int:
    tiles = stage_tiles(segments, config.stage_bytes)
    rows = max(s.rows * n for s, n in zip(segments, tiles, strict=True))
    return rows * ROW * 4 + max(tiles) * TILE * config.token_tile * 2


def kernel_rows(problem: Problem) -> int:
    """Rows of bfloat16 that the kernel sees."""
    return problem.rows * TERMS.get(problem.x_dtype, 1)


def even_strips(problem: Problem) -> bool:
    return math.ceil(problem.out_features / TILE) % 2 == 0


def direct_dtype(problem: Problem, split: bool) -> str:
    """What the kernel writes: the result itself where it has the whole sums."""
    whole = not split and TERMS.get(problem.x_dtype, 1) == 1 and problem.out_dtype in ("bfloat16", "float16")
    return problem.out_dtype if whole else "float32"


def default_config(problem: Problem, target: str) -> GpuConfig:
    del target
    rows = kernel_rows(problem)
    tiles = math.ceil(rows / LARGEST_TOKEN_TILE)
    return _config(problem, 8 * math.ceil(rows / tiles / 8), None, None)


def candidates(problem: Problem, target: str) -> list[GpuConfig]:
    """The default first, then other ring and token tile sizes."""
    default = default_config(problem, target)
    found = [default, dataclasses.replace(default, split=not default.split, cluster=1)]
    if default.cluster > 1:
        found.append(dataclasses.replace(default, cluster=1))
    for token_tile in sorted({default.token_tile, 64, 96, LARGEST_TOKEN_TILE}):
        if token_tile > default.token_tile and kernel_rows(problem) <= default.token_tile:
            continue
        pairs = (1, 2) if token_tile <= TWO_PAIRS_TOKEN_TILE else (1,)
        cuts = itertools.product(pairs, (9 << 10, 18 << 10, 36 << 10))
        found += [_config(problem, token_tile, pair, stage_bytes) for pair, stage_bytes in cuts]
    fits = [c for c in dict.fromkeys(found) if c.slots >= 2]
    return [c for c in fits if _fits(problem, c)]


def _fits(problem: Problem, config: GpuConfig) -> bool:
    segments = tuple(stream_segment(s) for s in problem.segments)
    out_bytes = 4 if direct_dtype(problem, config.split) == "float32" else 2
    return shared_bytes(segments, config, out_bytes) <= SHARED_BYTES


def _config(problem: Problem, token_tile: int, pairs: int | None, stage_bytes: int | None) -> GpuConfig:
    segments = tuple(stream_segment(s) for s in problem.segments)
    units = math.ceil(problem.out_features / TILE) * math.ceil(kernel_rows(problem) / token_tile)
    blocks = multiprocessors(problem.device_kind)
    # Whole units leave blocks idle in the last round; cut ones cost a second pass over the results.
    split = units / (math.ceil(units / blocks) * blocks) < 0.85
    config = GpuConfig(
        token_tile=token_tile,
        pairs=pairs or (2 if token_tile <= TWO_PAIRS_TOKEN_TILE else 1),
        stage_bytes=stage_bytes or 18 << 10,
        slots=1,
        blocks=blocks,
        split=split,
        cluster=2 if not split and token_tile >= CLUSTER_TOKEN_TILE and even_strips(problem) else 1,
    )
    out = TILE * token_tile * (4 if direct_dtype(problem, split) == "float32" else 2)
    while (SHARED_BYTES - out) // _slot_bytes(segments, config) < 3 and config.stage_bytes > 1024:
        config = dataclasses.replace(config, stage_bytes=config.stage_bytes // 2)  # wide tiles of x: shorter stages
    slots = min(8, (SHARED_BYTES - out) // _slot_bytes(segments, config))
    return dataclasses.replace(config, slots=slots // config.pairs * config.pairs)
