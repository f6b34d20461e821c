"""How a product is cut on a TPU: rows and output channels of a block, loop unrolling, what stays in VMEM."""

import dataclasses
import math

from lq_kernels.backend import Problem
from lq_kernels.tpu.fields import CHUNK
from lq_kernels.tpu.layout import LANES, padded, padded_groups, schemes

MIB = 1 << 20
# VMEM of a core, and what of it a kernel may ask for: the compiler keeps some to itself.
VMEM = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB, "v7x": 64 * MIB, "tpu": 16 * MIB}
CORES = {"v4": 2, "v5p": 2}  # that share one program's grid
ROWS = 256  # of a block of x
KEEP_FROM = 2  # blocks of rows that make keeping the unpacked strip worth its VMEM


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """One way to run a product."""

    rows: int = ROWS  # of a block of x; fewer when there are fewer
    columns: int = 256  # output channels of a block, a multiple of 128
    unroll: int = 4  # chunks of 256 input channels per loop step
    keep: bool = False  # unpack a strip once and keep it in VMEM for all blocks of rows
    activations: str = "bfloat16"  # "int8": x is rounded to 8 bits per row; faster, and no longer exact


def vmem_limit(generation: str) -> int:
    return VMEM[generation] - (VMEM[generation] // 16 if VMEM[generation] > 16 * MIB else 0)


def vmem_bytes(problem: Problem, target: str, config: TpuConfig) -> int:
    """VMEM a call needs, up to the compiler's temporaries: blocks in and out twice, scratch once."""
    columns = min(config.columns, padded(problem.out_features, LANES))
    rows = padded(min(config.rows, terms(problem) * problem.rows), 16)
    channels = sum(padded(s.in_features, CHUNK) for s in problem.segments)
    blocks = rows * channels * 2 + rows * columns * 4
    scratch = 2 * rows * columns * 4
    for s in problem.segments:
        chunks, groups = padded(s.in_features, CHUNK) // CHUNK, padded_groups(s)
        parts = schemes(s.bits, target)
        blocks += sum(chunks * part.words * columns * 4 for part in parts)
        blocks += groups * columns * 4 * (2 if s.asymmetric else 1) + rows * padded(groups, LANES) * 4
        scratch += groups * columns * 4 * 2
        if config.keep:
            scratch += len(parts) * chunks * CHUNK * columns * 2
    return 2 * blocks + scratch


def terms(problem: Problem) -> int:
    return {"bfloat16": 1, "float16": 2, "float32": 3}[problem.x_dtype]


def fits(problem: Problem, target: str, config: TpuConfig) -> bool:
    return vmem_bytes(problem, target, config) <= 0.85 * vmem_limit(target.partition("-")[0])


def default_config(problem: Problem, target: str) -> TpuConfig:
    """The widest strip of at least four per core that fits, and the largest block of rows with it."""
    rows = terms(problem) * problem.rows
    cores = CORES.get(target.partition("-")[0], 1)
    for config in _preferences(rows):
        strips = math.ceil(problem.out_features / config.columns)
        if fits(problem, target, config) and (strips >= 4 * cores or config.columns == LANES):
            return config
    return TpuConfig(rows=16, columns=LANES, unroll=1)


def _preferences(rows: int):
    unroll = 4 if rows <= 64 else 1
    for block in (1024, 512, 256, 128, 64, 32, 16):
        if block < 256 and block // 2 >= rows:
            continue
        if block > 256 and rows < 2 * block:
            continue
        keep = rows >= KEEP_FROM * block
        for kept in (True, False) if keep else (False,):
            for columns in (512, 256, 128):
                yield TpuConfig(rows=min(block, padded(rows, 16)), columns=columns, unroll=unroll, keep=kept)


def candidates(problem: Problem, target: str) -> list[TpuConfig]:
    rows = terms(problem) * problem.rows
    found = [default_config(problem, target)]
    for block in (64, 128, 256, 512):
        for columns in (128, 256, 512, 1024):
            for unroll in (1, 2, 4, 8):
                for keep in (False, True) if rows > block else (False,):
                    config = TpuConfig(rows=min(block, padded(rows, 16)), columns=columns, unroll=unroll, keep=keep)
                    if columns <= padded(problem.out_features, LANES) and fits(problem, target, config):
                        found.append(config)
    return list(dict.fromkeys(found))
