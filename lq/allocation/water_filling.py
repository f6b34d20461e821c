"""Reverse water-filling: the widths at which a further bit is worth the same everywhere, in closed form.

Of units that lose n_i c_i 2^(-a b_i), n_i weights each, at a given mean width the sum is least where

    b_i = (log2 c_i - level) / a,      level = mean of log2 c_i - a R     (weighted with n_i, R the mean width),

where c_i 2^(-a b_i), the loss per weight, is the same for all. Against one width for all, the loss falls by the ratio
of the arithmetic to the geometric mean of c. Within bounds, units at a bound leave the equation, and the level is found
by bisection. a is 2 for fine uniform steps: the squared error falls four times with every bit.

The theory: Cover and Thomas, Elements of Information Theory, section 10.3.3. Of the channels of a matrix it is BAQ
(`lq.quantizers.baq`), here of the units of a model.
"""

import numpy as np
from jaxtyping import Float

from lq.allocation.problem import DEFAULT, Choice, NoOptions, Problem
from lq.allocation.rounding import rounded
from lq.errors import UserError

STEEPEST = (
    1e-9  # what is left of a unit's loss at its largest option at least: measured ones may come out at 0 or below
)


def water_filling(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """Widths at which a further bit saves the same everywhere, in closed form (reverse water-filling)."""
    del options
    hulls = [problem.hull(unit) for unit in range(len(problem.cost))]
    # Between the ends of its hull a unit is taken to lose first (last / first)^place.
    ends = np.array([[f[0], f[-1]] for f in hulls], int).reshape(-1, 2)
    first, last = (problem.costs_of(end) for end in ends.T)
    span = (problem.sizes_of(ends[:, 1]) - problem.sizes_of(ends[:, 0])).astype(float)
    places = np.zeros(len(span))
    live = (span > 0) & (first > 0)
    if live.any():
        slope = np.log2(first[live] / np.maximum(last[live], STEEPEST * first[live]))
        room = problem.budget - problem.total_size(ends[:, 0])
        mean = min(room / span[live].sum(), 1.0)
        c = first[live] / span[live]
        places[live] = reverse_water_filling(c, mean, 0.0, 1.0, slope, span[live])
    return rounded(problem, places)


def reverse_water_filling(
    c: Float[np.ndarray, " K"],
    mean: float,
    low: float,
    high: float,
    slope: float | Float[np.ndarray, " K"] = 2.0,
    sizes: Float[np.ndarray, " K"] | None = None,
) -> Float[np.ndarray, " K"]:
    """The real widths b of the given mean, within [low, high], of least sum of sizes c 2^(-slope b). float64.

    b is log2(c slope / level) / slope, clipped: where no bound holds a bit is worth the same everywhere, and the level
    is found by bisection. With one slope and without bounds it is the geometric mean of c, times slope 2^(-slope mean).

    Args:
      c: what each loses per unit of size at no bits.
      mean: of the widths, weighted with the sizes.
      low, high: bounds.
      slope: how fast a loss falls, for all or for each.
      sizes: how much each counts; all the same when None.

    Raises:
      UserError: a mean that is not within the bounds.
    """
    if not low <= mean <= high:
        raise UserError(f"widths from {low} to {high} of mean {mean}; write a mean between them")
    slope = np.broadcast_to(np.asarray(slope, np.float64), np.shape(c))
    sizes = np.ones(len(c)) if sizes is None else np.asarray(sizes, np.float64)
    logs = np.log2(np.maximum(np.asarray(c, np.float64) * slope, np.finfo(np.float64).tiny))
    widths = lambda level: np.clip((logs - level) / slope, low, high)  # noqa: E731
    below, above = (logs - slope * high).min(), (logs - slope * low).max()  # all widths are high, all are low
    for _ in range(200):
        middle = (below + above) / 2
        more = (sizes * widths(middle)).sum() > mean * sizes.sum()
        below, above = (middle, above) if more else (below, middle)
    return widths((below + above) / 2)
