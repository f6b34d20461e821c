"""Sequential refinement: what a step from the plan at hand costs is measured there, and the plan is made again.

Costs that were measured one unit at a time in a clean model are wrong in a damaged one. So around the incumbent every
unit is measured a level up and a level down, all others as they are,

    C[k, o] = loss(incumbent with k at o) - loss(incumbent),

and the exact knapsack of these costs, what was not measured not being offered, is the next plan, if the loss falls that
is measured of it. If it does not, too many steps were taken at once, and fewer are tried (`lq.search.tolls`).
Interactions are so paid for by measuring again, which is sequential linear programming with a line search.

exllamav3 does this with the models of two whole bitrates; it damps gains, |dKL|^0.69, and not losses (`power`), so that
one large gain does not decide alone.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lq.allocation import ALLOCATORS
from lq.allocation.problem import Choice, Problem
from lq.errors import UserError
from lq.search.generation import Generation, Loss
from lq.search.tolls import with_tolls


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineOptions:
    generations: int = 3  # rounds of measuring and choosing; it ends before when no choice is better
    reach: int = 1  # levels up and down that are measured
    power: float = 1.0  # of gains; 0.69 as exllamav3
    allocator: str = "knapsack"

    def __post_init__(self):
        for name, least in (("generations", 0), ("reach", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)}; write {least} or more")
        if not 0 < self.power < float("inf"):
            raise UserError(f"power: {self.power}; write a number above 0, such as 1")
        _ = ALLOCATORS[self.allocator]


def refine(problem: Problem, start: Choice, loss: Loss, text: int, options: RefineOptions) -> Iterator[Generation]:
    """Sequential refinement: steps around the plan are measured, the plan is made again, and kept if it loses less.

    Yields the incumbent behind every round, and ends with a round in which nothing better was found.

    Args:
      problem: options in the order of their sizes in every unit, and the budget; costs are not looked at, but for what
        is not offered.
      start: within the budget.
      loss: of several choices, always asked on all text.
      text: how many windows there are.
      options: of the search.
    """
    incumbent = np.asarray(start).copy()
    lost = float(loss([incumbent], range(text))[0])
    for _ in range(options.generations):
        cost = measured_around(problem, incumbent, lost, loss, text, options.reach)
        damped = np.where(cost < 0, -(np.abs(cost) ** options.power), cost)
        better = None
        for choice in with_tolls(problem, incumbent, damped, options.allocator):
            if (found := float(loss([choice], range(text))[0])) < lost:
                better = choice, found
                break
        if better is None:
            yield Generation(incumbent, lost)
            return
        incumbent, lost = better
        yield Generation(incumbent, lost)


def measured_around(problem: Problem, incumbent: Choice, lost: float, loss: Loss, text: int, reach: int) -> np.ndarray:
    """C `[units, options]`: 0 at the incumbent, infinite for options that are no `reach` levels away."""
    cost, steps = np.full(problem.cost.shape, np.inf), []
    cost[np.arange(len(incumbent)), incumbent] = 0.0
    for unit, offered in enumerate(problem.offered):
        levels = np.flatnonzero(offered)
        at = int(np.searchsorted(levels, incumbent[unit]))
        near = levels[max(at - reach, 0) : at + reach + 1]
        steps += [(unit, option) for option in near if option != incumbent[unit]]
    changed = np.repeat(incumbent[None], len(steps), 0)
    for row, (unit, option) in zip(changed, steps, strict=True):
        row[unit] = option
    for (unit, option), found in zip(steps, loss(list(changed), range(text)), strict=True):
        cost[unit, option] = found - lost
    return cost
