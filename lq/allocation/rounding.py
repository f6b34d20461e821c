"""From real widths to options, by largest remainder: what the rules with a formula end with.

A rule says where between its smallest and its largest option a unit should lie. It gets the largest option that is no
larger; then the units, those that lost most by it first, go up one option each as long as the budget lasts.
"""

import numpy as np
from jaxtyping import Float

from lq.allocation.latency import settled
from lq.allocation.problem import Choice, Problem


def frontier(problem: Problem, unit: int) -> list[int]:
    """The options that no smaller or equal one undercuts, smallest first: rising sizes, falling costs."""
    found: list[int] = []
    for option in np.lexsort((problem.cost[unit], problem.size[unit])):
        if np.isfinite(problem.cost[unit, option]) and (
            not found or problem.cost[unit, option] < problem.cost[unit, found[-1]]
        ):
            found.append(int(option))
    return found


def rounded(problem: Problem, places: Float[np.ndarray, " units"]) -> Choice:
    """The options nearest the real widths, within the budget and the limit.

    Args:
      problem: what is left over is spent by its costs.
      places: of each unit between the smallest and the largest option of its frontier, from 0 to 1.
    """
    choice, above = problem.smallest(), np.full(len(places), -1)
    lost = np.zeros(len(places))
    for unit, place in enumerate(places):
        options = frontier(problem, unit)
        size = problem.size[unit, options]
        real = size[0] + place * (size[-1] - size[0])
        at = max(int(np.searchsorted(size, real, side="right")) - 1, 0)
        choice[unit] = options[at]
        if at + 1 < len(options):
            above[unit], lost[unit] = options[at + 1], (real - size[at]) / (size[-1] - size[0])
    left = problem.budget - problem.total_size(choice)
    for unit in np.argsort(-lost, kind="stable"):
        if (
            above[unit] >= 0
            and (step := int(problem.size[unit, above[unit]] - problem.size[unit, choice[unit]])) <= left
        ):
            choice[unit] = above[unit]
            left -= step
    return settled(problem, choice)
