"""Units: what gets one score and one width. A unit's name says which matrices it is made of.

block    block_3                                      all matrices of a block
part     block_3/attention, block_3/mlp               its attention, its feed-forward network
group    block_3/attention/q_proj+k_proj+v_proj       matrices that read the same input; servers fuse them
matrix   block_3/attention/q_proj
segment  block_3/attention/q_proj:0/8             the first eighth of its input channels, those of most energy

Embedding and head, where they count, are units of their own: embed/tokens, head.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from lq.calibration.taps import block_inputs
from lq.models.config import ModelConfig
from lq.models.matrices import block_of, matrices, table_matrices

Unit = Literal["block", "part", "group", "matrix"]  # segments are units of the scores that price them


def units_of(config: ModelConfig, unit: Unit, *, tables: bool = False) -> dict[str, list[str]]:
    """The units of a model and the matrices of each, by path, first block first; embedding and head last, if asked."""
    found: dict[str, list[str]] = {}
    for path in matrices(config):
        found.setdefault(_name(config, path, unit), []).append(path)
    return found | ({path: [path] for path in table_matrices(config)} if tables else {})


def segment_name(path: str, index: int, count: int) -> str:
    """The unit that is one of the `count` segments of a matrix."""
    return f"{path}:{index}/{count}"


def segment_of(unit: str) -> tuple[str, int, int] | None:
    """Matrix, index and count of a unit that is a segment; None for one that is not."""
    found = re.fullmatch(r"(.+):(\d+)/(\d+)", unit)
    return (found[1], int(found[2]), int(found[3])) if found else None


def units_in(units: Mapping[str, list[str]], block: int) -> dict[str, list[str]]:
    """Those of the units that lie in a block."""
    return {unit: paths for unit, paths in units.items() if block_of(paths[0]) == block}


def members(unit: str, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that the unit of this name is made of, or a segment of."""
    if found := segment_of(unit):
        return [path for path in paths if path == found[0]]
    *where, names = unit.split("/")
    wanted = tuple("/".join([*where, name]) for name in names.split("+"))
    return [path for path in paths if path in wanted or path.startswith(tuple(f"{name}/" for name in wanted))]


def _name(config: ModelConfig, path: str, unit: Unit) -> str:
    """Of the unit that a matrix belongs to."""
    block, part, _ = path.split("/", 2)
    if unit == "block":
        return block
    if unit == "part":
        return f"{block}/{part}"
    if unit == "matrix":
        return path
    within = path.removeprefix(f"{block}/")
    kind = config.kinds[int(block.removeprefix("block_"))]
    readers = next(one.readers for one in block_inputs(config, kind) if within in one.readers)
    where = within.rpartition("/")[0]
    return f"{block}/{where}/{'+'.join(reader.rpartition('/')[2] for reader in readers)}"
