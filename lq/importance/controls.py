"""Orders that know nothing of the model's weights: what a score must beat before it may claim anything.

In published comparisons a good part of an ordering's gain is reached by protecting the ends, and some of it by any
change of order at all; a table without these rows cannot tell.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from lq.errors import UserError
from lq.importance.scores import Scores
from lq.importance.units import Unit, units_of
from lq.models.matrices import block_matrices, matrices
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomOptions:
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; write 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For a score without choices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    unit: Literal["matrix"] = "matrix"


def random(source: ParameterSource, windows: None, options: RandomOptions) -> dict:
    """Control: a random order, decided by the seed and the number of blocks alone."""
    del windows
    count = source.config.num_blocks
    places = np.random.default_rng(options.seed).permutation(count)
    return {"values": {f"block_{i}": float(p) for i, p in enumerate(places)}}


def first_last(source: ParameterSource, windows: None, options: NoOptions) -> dict:
    """Control: the ends protected, 0, L-1, 1, L-2, ... Minus the distance to the nearer end."""
    del windows, options
    last = source.config.num_blocks - 1
    return {"values": {f"block_{i}": -float(min(i, last - i)) for i in range(last + 1)}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountOptions:
    unit: Unit = "block"


def parameter_count(source: ParameterSource, windows: None, options: CountOptions) -> dict:
    """Control: how many weights a unit has. With costs by value every weight counts alike, and widths are nearly equal.

    By place it is the order of the units where all are of one size, as the blocks of most models.
    """
    del windows
    shapes = matrices(source.config)
    units = units_of(source.config, options.unit)
    return {"values": {unit: float(sum(math.prod(shapes[path]) for path in paths)) for unit, paths in units.items()}}


def ends_random(source: ParameterSource, windows: None, options: RandomOptions) -> dict:
    """Control: the first two blocks and the last are protected, the others in a random order, decided by the seed."""
    del windows
    count = source.config.num_blocks
    places = np.random.default_rng(options.seed).permutation(count)
    ends = {0, 1, count - 1}
    return {"values": {f"block_{i}": float(count if i in ends else place) for i, place in enumerate(places)}}


def k_quant(source: ParameterSource, windows: None, options: RecipeOptions) -> dict:
    """Control: v_proj and down_proj up, more in some blocks, then o_proj: the recipe of llama.cpp's K-quant mixes.

    Three tiers of matrices: v_proj and down_proj where `use_more_bits`; v_proj and down_proj elsewhere, and o_proj; the
    rest. The first tier is the recipe of Q4_K_M, Q5_K_M and of mlx-lm's mixes; that the second comes next is Q3_K_M's.
    A recipe has no budget of its own; within a tier the first blocks come first where it ends amid one.
    """
    del windows, options
    values, count = {}, source.config.num_blocks
    for index, kind in enumerate(source.config.kinds):
        for path in block_matrices(source.config, kind):
            raised = path.endswith(("v_proj", "down_proj"))
            tier = 2 if raised and use_more_bits(index, count) else raised or path.endswith("o_proj")
            values[f"block_{index}/{path}"] = float(tier)
    return {"values": values}


def use_more_bits(block: int, blocks: int) -> bool:
    """llama.cpp's rule: the first eighth, the last eighth, and every third block between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def reverse(scores: Scores) -> Scores:
    """The same scores with the order turned round, ties included, named `reverse METRIC`."""
    ranking = scores.ranking()
    place = {unit: float(i) for i, unit in enumerate(ranking)}  # the most important gets 0, the least
    values = {unit: place[unit] for unit in scores.values}
    return dataclasses.replace(
        scores, metric=f"reverse {scores.metric}", values=values, costs={}, interactions={}, extra={}
    )
