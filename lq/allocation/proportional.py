"""Proportional: a width that is linear in the score, between bounds.

    b_l = clip(spread (max - min) s_l + mu, min, max)

min and max are the least and the greatest width there is, mu is found by bisection so that the budget is spent, and s_l
is the score between 0 and 1: what its bits would save a unit, per bit, cut off at the 5th and the 95th percentile of
all units and stretched. One score without measure would otherwise take everything. OWL's rule with a deviation of at
most lambda bits either way is `spread` = 2 lambda / (max - min) (Yin et al., arXiv 2310.05175, who so give sparsities).

Nothing makes a linear rule right: where a unit's loss is r 4^-b it is the logarithm of r/n that should be (see
`lq.allocation.water_filling`). It is here because it is what is done.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from lq.allocation.problem import Choice, Problem
from lq.allocation.rounding import frontier, rounded
from lq.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalOptions:
    spread: float = 1.0  # between the least and the most important unit, of the range of widths
    cut: float = 0.05  # share of the units beyond either end of the scores' range

    def __post_init__(self):
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise UserError(f"spread: {self.spread}; write 0 or more, such as 1")
        if not 0 <= self.cut < 0.5:
            raise UserError(f"cut: {self.cut}; write a share below a half, such as 0.05")


def proportional(problem: Problem, options: ProportionalOptions | None = None) -> Choice:
    """Widths that rise linearly with the score, within bounds (as OWL's)."""
    options = options or ProportionalOptions()
    ends = [frontier(problem, unit) for unit in range(len(problem.cost))]
    span = np.array([int(problem.size[unit, f[-1]] - problem.size[unit, f[0]]) for unit, f in enumerate(ends)], float)
    saved = np.array([float(problem.cost[unit, f[0]] - problem.cost[unit, f[-1]]) for unit, f in enumerate(ends)])
    scores = winsorized(np.divide(saved, span, out=np.zeros(len(span)), where=span > 0), options.cut)
    room = problem.budget - problem.total_size(problem.smallest())
    return rounded(problem, shifted(options.spread * scores, span, room))


def winsorized(scores: Float[np.ndarray, " units"], cut: float) -> Float[np.ndarray, " units"]:
    """From 0 to 1, linearly between the percentiles `cut` and 1 - `cut`; all 0 where these are one."""
    if not len(scores):
        return scores
    low, high = np.quantile(scores, [cut, 1 - cut])
    return np.clip((scores - low) / (high - low), 0, 1) if high > low else np.zeros(len(scores))


def shifted(
    places: Float[np.ndarray, " units"], span: Float[np.ndarray, " units"], room: float
) -> Float[np.ndarray, " units"]:
    """clip(places + mu, 0, 1) such that the sum of span times it is `room`; 1 for all where there is room for more."""
    if not len(places) or room >= span.sum():
        return np.ones(len(places))
    below, above = -places.max(), 1 - places.min()  # all at 0, all at 1
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (below, middle) if (span * np.clip(places + middle, 0, 1)).sum() > room else (middle, above)
    return np.clip(places + below, 0, 1)
