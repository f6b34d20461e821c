"""exllamav2's allocator: simulated annealing of the sum of err^norm, `norm` chosen so that no unit is left to suffer.

err is the relative error of a unit's output; the squared error is what costs are, so that err = sqrt(cost) here, and
norm 2 asks for the least sum of costs. A larger norm asks more for the worst unit. From the smallest option of every
unit, a proposal changes one unit to any of its options, and is taken when it fits and

    d < 0   or   u < exp(-d / T),      d the change of the sum, u uniform in [0, 1),

T falling geometrically from 2 to 1e-4. A first set of runs has norms from 1.5 to 3.5; the one that leaves the smallest
largest error decides the norm of a second set, within 0.075 of it, and that of the third, all at one norm, whose least
sum is the answer. What is left is spent where it saves most per bit; the original's last pass goes through the units in
their order, and so favours the first.

The original makes 1000 proposals at each of some 2000 temperatures, about a thousand for each option of a 7B model.
Here their number grows with the problem, and all runs of a set go side by side. It is what the result hangs on: since
one unit changes at a time, an exchange at the edge of the budget must first lose.

Source: the code of exllamav2 (conversion/optimize.py and its extension).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from lq.allocation.latency import settled
from lq.allocation.problem import Choice, Problem
from lq.errors import UserError

NORMS, NEAR = (1.5, 3.5), 0.075  # of the first set; how far the second goes from the best of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnealingOptions:
    runs: int = 80  # of each set
    proposals: int = 200  # of a run, for each option of each unit
    hottest: float = 2.0  # T at the beginning, in units of the largest cost
    coldest: float = 1e-4  # at the end
    norm: float | None = None  # fixed, one set alone; 2 for the least sum of costs. None: searched for
    seed: int = 0

    def __post_init__(self):
        for name in ("runs", "proposals"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}; write 1 or more")
        if not 0 < self.coldest <= self.hottest < float("inf"):
            raise UserError(f"coldest: {self.coldest}, hottest: {self.hottest}; write numbers above 0, the first less")
        if self.norm is not None and not 0 < self.norm < float("inf"):
            raise UserError(f"norm: {self.norm}; write a number above 0, such as 2")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; write 0 or more")


def annealing(problem: Problem, options: AnnealingOptions | None = None) -> Choice:
    """Simulated annealing of the sum of err^norm, the norm searched for (exllamav2)."""
    options = options or AnnealingOptions()
    start = settled(problem, problem.smallest()) if problem.latency is not None else problem.smallest()
    if not len(start):
        return start
    rng = np.random.default_rng(options.seed)
    cost = np.where(problem.offered, np.maximum(problem.cost, 0.0), 0.0)
    error = np.sqrt(cost / max(cost.max(), np.finfo(float).tiny))

    def runs(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        norms = np.linspace(low, high, options.runs)
        return norms, annealed(problem, error, norms, start, options, rng)

    def fairest(norms: np.ndarray, choices: np.ndarray) -> float:
        return float(norms[np.argmin(error[np.arange(len(start)), choices].max(1))])

    norm = options.norm
    if norm is None:
        found = fairest(*runs(*NORMS))
        norm = fairest(*runs(found - NEAR, found + NEAR))
    _, choices = runs(norm, norm)
    sums = (error[np.arange(len(start)), choices] ** norm).sum(1)
    return settled(problem, choices[np.argmin(sums)])


def annealed(
    problem: Problem,
    error: Float[np.ndarray, "units options"],
    norms: Float[np.ndarray, " runs"],
    start: Choice,
    options: AnnealingOptions,
    rng: np.random.Generator,
) -> Int[np.ndarray, "runs units"]:
    """Where a run of every norm ends, all from `start`."""
    runs, (units, widths) = len(norms), error.shape
    power = error[None] ** norms[:, None, None]  # [runs, units, options]
    choices, each = np.tile(start, (runs, 1)), np.arange(runs)
    latency = np.zeros_like(problem.size) if problem.latency is None else problem.latency
    size, time = np.full(runs, problem.total_size(start)), np.full(runs, problem.total_latency(start))
    steps = options.proposals * units * widths
    temperatures = np.geomspace(options.hottest, options.coldest, steps)
    for first in range(0, steps, 1024):  # numbers are drawn for so many steps at a time
        count = min(1024, steps - first)
        drawn_units, drawn_options = rng.integers(units, size=(count, runs)), rng.integers(widths, size=(count, runs))
        # u < exp(-d / T)  <=>  d < -T log u, which is above 0: one rule for both cases.
        threshold = temperatures[first : first + count, None] * rng.exponential(size=(count, runs))
        for unit, option, most in zip(drawn_units, drawn_options, threshold, strict=True):
            now = choices[each, unit]
            sizes = size + problem.size[unit, option] - problem.size[unit, now]
            times = time + latency[unit, option] - latency[unit, now]
            taken = (power[each, unit, option] - power[each, unit, now] < most) & problem.offered[unit, option]
            taken &= (sizes <= problem.budget) & (times <= problem.limit)
            choices[each, unit] = np.where(taken, option, now)
            size, time = np.where(taken, sizes, size), np.where(taken, times, time)
    return choices
