"""How a product is cut on a TPU: rows and output channels of a block, loop unrolling, what stays in VMEM."""

import dataclasses
import math

from lq_kernels.backend import Problem, require
from lq_kernels.tpu.fields import CHUNK
from lq_kernels.tpu.layout import LANES, padded, padded_groups, schemes

MIB = 1 << 20
# VMEM of a core, and what of it a kernel may ask for: the compiler keeps some to itself.
VMEM = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB, "v7x": 64 * MIB, "tpu": 16 * MIB}
CORES = {"v4": 2, "v5p": 2}  # that share one program's grid
ROWS = 1024  # of a block of x
TURN = 256  # of them multiplied by one run of code
DEEP = ("v6e", "v7x")  # generations whose matrix unit is 256 deep, two groups of 128
SCALED_FROM = 256  # rows of bfloat16
INTEGER_UNITS = ("v5e", "v5p", "v6e")  # generations whose matrix unit multiplies int8
DIGITS = 4  # int8 rows that a row of x becomes
DIGITS_TO = 4  # rows of x; from there on digits cost as much as bfloat16 in groups of 32


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """One way to run a product."""

    rows: int = ROWS  # of a block of x; fewer when there are fewer
    turn: int = TURN  # rows of a block that one run of code multiplies; all of them where it does not divide them
    columns: int = 256  # output channels of a block, a multiple of 128
    unroll: int = 8  # chunks of 256 input channels per loop step
    depth: int = 32  # input channels of a dot; the groups in it share one, each with its own rows of x
    keep: bool = False  # unpack a strip once and keep it in VMEM for all blocks of rows
    scaled: bool = False  # scale weights before the dot, rounded to bfloat16: dots then are as deep as the matrix unit
    # "digits": x as four rows of int8 digits, exact but for 2**-28 of a row's largest number. "int8": x is rounded to 8
    # bits per row; faster where there are many, and no longer exact.
    activations: str = "bfloat16"

    def __post_init__(self):
        for field in ("rows", "turn", "unroll", "depth"):
            require(self, field, getattr(self, field) >= 1, "1 or more")
        require(self, "columns", self.columns >= 1 and self.columns % 128 == 0, "a multiple of 128")
        kinds = ("bfloat16", "digits", "int8")
        require(self, "activations", self.activations in kinds, f"one of {', '.join(kinds)}")


def tile(config: TpuConfig, rows: int, columns: int, generation: str) -> tuple[int, int]:
    """Rows and columns of the sums held at a time: 32 of the 64 registers, which leaves the others to unpack in.

    Scaled, the matrix unit of v6e costs less with all 64, and v7x' adds up by itself; v4 spills either way.
    """
    if rows <= 64 and columns <= 512:
        return rows, columns
    wide = 128 if columns % 256 else 256
    return (256 if config.scaled or generation == "v4" else 32 * 1024 // wide), wide


def vmem_limit(generation: str) -> int:
    return VMEM[generation] - (VMEM[generation] // 16 if VMEM[generation] > 16 * MIB else 0)


def vmem_bytes(problem: Problem, target: str, config: TpuConfig) -> int:
    """VMEM a call needs, up to the compiler's temporaries: blocks in and out twice, scratch once."""
    columns = min(config.columns, padded(problem.out_features, LANES))
    rows = padded(min(config.rows, max(DIGITS, terms(problem)) * problem.rows), 16)
    channels = sum(padded(s.in_features, CHUNK) for s in problem.segments)
    blocks = rows * channels * 2 + rows * columns * 4
    scratch = 2 * rows * columns * 4
    for s in problem.segments:
        chunks, groups = padded(s.in_features, CHUNK) // CHUNK, padded_groups(s)
        parts = schemes(s.bits, target)
        blocks += sum(chunks * part.words * columns * 4 for part in parts)
        blocks += groups * columns * 4 * (2 if s.asymmetric else 1) + rows * padded(3 * groups, LANES) * 2
        scratch += groups * columns * 4 * 2
        if config.keep:
            scratch += len(parts) * chunks * CHUNK * columns * 2
    return 2 * blocks + scratch


def terms(problem: Problem) -> int:
    """Rows that the kernel gets of each row of x, unless they are digits."""
    return {"bfloat16": 1, "float16": 2, "float32": 3}[problem.x_dtype]


def fits(problem: Problem, target: str, config: TpuConfig) -> bool:
    return vmem_bytes(problem, target, config) <= 0.85 * vmem_limit(target.partition("-")[0])


def default_config(problem: Problem, target: str) -> TpuConfig:
    """The widest strip of which every core gets four, that fits VMEM; many rows in turns that share its unpacking.

    A run of code is as long as it may be: filling and draining the matrix unit costs 100 to 300 bundles.
    """
    enough = 4 * CORES.get(target.partition("-")[0], 1)
    preferred = list(_preferences(problem, target))
    for config in preferred:
        several = (
            problem.out_features >= enough * config.columns or config.columns <= (2 if config.scaled else 1) * LANES
        )
        if several and fits(problem, target, config):
            return config
    return preferred[-1]


def _preferences(problem: Problem, target: str):
    """Many rows to a block before few, the unpacked strip kept before not, wide strips before narrow.

    Each block of rows is fetched once for every strip: where there are several, the strips had better be wide.
    """
    generation = target.partition("-")[0]
    digits = _digits(problem, generation)
    rows = problem.rows * (DIGITS if digits else terms(problem))
    scaled = _scaled(problem, generation)
    chunks = max(padded(s.in_features, CHUNK) // CHUNK for s in problem.segments)
    unroll = _unroll(chunks, 64 if scaled else 16)
    longest = 2 * TURN if scaled and unroll <= 16 else TURN
    for halvings in range(int(math.log2(ROWS // 16)) + 1):
        blocks = math.ceil(rows / (ROWS >> halvings))
        turns = math.ceil(rows / blocks / longest)
        turn = padded(math.ceil(rows / (blocks * turns)), 16)
        for keep in (True, False) if blocks * turns > 1 else (False,):
            for columns in (512, 256, 128) if rows <= 64 else (1024, 512, 256, 128) if blocks > 1 else (256, 128):
                yield TpuConfig(
                    rows=turn * turns,
                    turn=turn,
                    columns=min(columns, padded(problem.out_features, LANES)),
                    unroll=unroll,
                    depth=_depth(generation, rows, digits),
                    keep=keep,
                    scaled=scaled,
                    activations="digits" if digits else "bfloat16",
                )


def _digits(problem: Problem, generation: str) -> bool:
    """Whether few rows are multiplied digit by digit, in integers, for which codes unpack with less work.

    Only bfloat16: its numbers are their digits but where they are 2**20 times smaller than the row's largest.
    """
    return problem.x_dtype == "bfloat16" and problem.rows <= DIGITS_TO and generation in INTEGER_UNITS


def _scaled(problem: Problem, generation: str) -> bool:
    """Whether many rows meet weights rounded to bfloat16, as in any product of a dequantized matrix.

    A dot per group of 128 takes the time of 256 on a matrix unit that deep. Only where x and the result are rounded
    to bfloat16 too: that is as large an error.
    """
    rounded = problem.x_dtype == problem.out_dtype == "bfloat16"
    short = any(s.group_size < min(CHUNK, s.in_features) for s in problem.segments)
    return rounded and short and problem.rows >= SCALED_FROM and generation in DEEP


def _unroll(chunks: int, most: int) -> int:
    """At most so many, and such that the turns of the longest segment's loop leave few chunks over."""
    return math.ceil(chunks / math.ceil(chunks / most))


def _depth(generation: str, rows: int, digits: bool) -> int:
    """Few rows leave the matrix unit room for the rows of several groups at once, so it is filled to its depth."""
    return 128 if digits or (rows <= 8 and generation in ("v5e", "v5p")) else 32


def candidates(problem: Problem, target: str) -> list[TpuConfig]:
    """The default and what fits VMEM around it."""
    default = default_config(problem, target)
    widest = padded(problem.out_features, LANES)
    found = [default]
    for columns in (128, 256, 512, 1024):
        for unroll in (4, 8, 16):
            for block in (64, 128, 256, 512):
                for keep in (False, True):
                    config = dataclasses.replace(
                        default, rows=min(block, default.rows), columns=columns, unroll=unroll, keep=keep
                    )
                    several = terms(problem) * problem.rows > min(config.rows, config.turn)
                    if columns <= widest and several >= keep and fits(problem, target, config):
                        found.append(config)
    return list(dict.fromkeys(found))
