"""The exact solution of a `Problem`: dynamic programming over Pareto states, cut off by the bound of the relaxation.

With the price p of the relaxation every option has a reduced cost r = c + p s - min (c + p s), 0 for the ones that the
relaxation takes. A choice costs

    bound + sum over units of r + p (budget - its size),

so that no choice better than one at hand has reduced costs that sum to more than `best - bound`. Few options are left
then, most units have one, and of the states (size, cost) that the first k units can be in only those that no other
beats in both are kept. No unit of size is assumed: sizes may have no common divisor.
"""

import numpy as np

from lq.allocation.problem import DEFAULT, Choice, NoOptions, Problem
from lq.allocation.relaxation import greedy, relax

SLACK = 1e-9  # of the costs at hand: what rounding may take from the bound


def knapsack(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """The least cost there is, exactly: dynamic programming over Pareto states."""
    del options
    relaxed, best = relax(problem), greedy(problem)
    gap = problem.total_cost(best) - relaxed.bound + SLACK * np.abs(problem.costs_of(best)).sum()
    priced = problem.cost + relaxed.price * problem.size
    reduced = priced - priced.min(1, keepdims=True)
    left = [np.flatnonzero(row <= gap) for row in reduced]
    # What the units still to come take at least: a state that leaves less than that leads nowhere.
    least = np.array([problem.size[unit, open_to].min() for unit, open_to in enumerate(left)])
    room = problem.budget - (np.cumsum(least[::-1])[::-1] - least)

    size, cost, spent = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail = []
    for unit, open_to in enumerate(left):
        sizes, costs, gaps = (
            (state[:, None] + table[unit, open_to]).ravel()
            for state, table in ((size, problem.size), (cost, problem.cost), (spent, reduced))
        )
        alive = np.flatnonzero((gaps <= gap) & (sizes <= room[unit]))
        order = alive[np.lexsort((costs[alive], sizes[alive]))]
        # Larger states are kept where they cost less than all smaller ones.
        before = np.minimum.accumulate(np.concatenate([[np.inf], costs[order][:-1]]))
        kept = order[costs[order] < before]
        size, cost, spent = sizes[kept], costs[kept], gaps[kept]
        trail.append((kept // len(open_to), open_to[kept % len(open_to)]))
    return _traced_back(trail, int(np.argmin(cost)))


def _traced_back(trail: list[tuple[np.ndarray, np.ndarray]], state: int) -> Choice:
    """The options on the way to the last `state`; of each unit, `trail` has the state before and the option taken."""
    found = []
    for before, option in reversed(trail):
        found.append(option[state])
        state = before[state]
    return np.array(found[::-1], int)
