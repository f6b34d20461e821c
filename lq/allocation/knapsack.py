"""The exact solution of a `Problem`: dynamic programming over Pareto states, cut off by the bound of the relaxation.

With the price p of the relaxation every option has a reduced cost r = c + p s - min (c + p s), 0 for the ones that the
relaxation takes. A choice costs

    bound + sum over units of r + p (budget - its size),

so that no choice better than one at hand has reduced costs that sum to more than `best - bound`. Few options are left
then, most units have one, and of the states (size, cost) that the first k units can be in only those that no other
beats in both are kept. No unit of size is assumed: sizes may have no common divisor.

With a limit on latencies t a second price q joins, r = c + p s + q t - min (c + p s + q t), both from the dual of the
linear program, and a state is kept unless another beats it in all three. Many more remain; `MOST_STATES` is the most.
"""

import bisect

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, kron

from lq.allocation.problem import DEFAULT, Choice, NoOptions, Problem
from lq.allocation.relaxation import greedy, relax
from lq.errors import UserError

SLACK = 1e-9  # of the costs at hand: what rounding may take from the bound
MOST_STATES = 200_000  # of size, latency and cost


def knapsack(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """The least cost there is, exactly: dynamic programming over Pareto states.

    Raises UserError when budget and limit cannot be met together, or leave too many states.
    """
    del options
    best = greedy(problem)
    size, latency = problem.size, np.zeros_like(problem.size) if problem.latency is None else problem.latency
    p, q, bound = _prices(problem)
    priced = problem.cost + p * size + q * latency
    gap = problem.total_cost(best) - bound + SLACK * np.abs(problem.costs_of(best)).sum()
    reduced = priced - priced.min(1, keepdims=True)
    left = [np.flatnonzero(row <= gap) for row in reduced]
    room = _room(size, left, problem.budget), _room(latency, left, problem.limit)

    tables = size, latency, problem.cost, reduced
    states = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail = []
    for unit, open_to in enumerate(left):
        sizes, latencies, costs, gaps = (
            (state[:, None] + table[unit, open_to]).ravel() for state, table in zip(states, tables, strict=True)
        )
        alive = np.flatnonzero((gaps <= gap) & (sizes <= room[0][unit]) & (latencies <= room[1][unit]))
        if problem.latency is None:
            kept = alive[_cheaper_than_smaller(sizes[alive], costs[alive])]
        else:
            kept = alive[_undominated(sizes[alive], latencies[alive], costs[alive])]
        states = sizes[kept], latencies[kept], costs[kept], gaps[kept]
        trail.append((kept // len(open_to), open_to[kept % len(open_to)]))
    return _traced_back(trail, int(np.argmin(states[2])))


def _prices(problem: Problem) -> tuple[float, float, float]:
    """Of a bit and of a nanosecond, none below 0, and the bound they give: any would give one, these the best."""
    if problem.latency is None or not len(problem.cost):
        relaxed = relax(problem)
        return relaxed.price, 0.0, relaxed.bound
    offered, cost = problem.offered, np.where(problem.offered, problem.cost, 0.0)
    scale = max(float(np.abs(cost).max()), np.finfo(float).tiny)
    tables = [(problem.size, problem.budget), (problem.latency, problem.limit)]
    units = [max(int(np.abs(table).max()), 1) for table, _ in tables]
    found = linprog(
        cost.ravel() / scale,
        A_eq=kron(csr_array(np.eye(len(cost))), np.ones((1, cost.shape[1]))),
        b_eq=np.ones(len(cost)),
        A_ub=np.stack([table.ravel() / unit for (table, _), unit in zip(tables, units, strict=True)]),
        b_ub=[limit / unit for (_, limit), unit in zip(tables, units, strict=True)],
        bounds=np.stack([np.zeros(cost.size), offered.ravel().astype(float)], axis=1),
    )
    marginals = np.zeros(2) if found.x is None else np.maximum(-found.ineqlin.marginals, 0.0)
    p, q = (float(price) * scale / unit for price, unit in zip(marginals, units, strict=True))
    least = (problem.cost + p * problem.size + q * problem.latency).min(1).sum()
    return p, q, float(least - p * problem.budget - q * problem.limit)


def _room(table: np.ndarray, left: list[np.ndarray], limit: int) -> np.ndarray:
    """What the first units may take: a state that leaves less than the least of those to come leads nowhere."""
    least = np.array([table[unit, open_to].min() for unit, open_to in enumerate(left)])
    return limit - (np.cumsum(least[::-1])[::-1] - least)


def _cheaper_than_smaller(sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Indices of the states that cost less than all smaller ones, smallest first."""
    order = np.lexsort((costs, sizes))
    before = np.minimum.accumulate(np.concatenate([[np.inf], costs[order][:-1]]))
    return order[costs[order] < before]


def _undominated(sizes: np.ndarray, latencies: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Indices of the states that no other beats in size, latency and cost, smallest first.

    Of those as small or smaller, a staircase is held: rising latencies, falling costs.
    """
    kept, steps, falling = [], [], []
    for state in np.lexsort((costs, latencies, sizes)):
        latency, cost = int(latencies[state]), float(costs[state])
        place = bisect.bisect_right(steps, latency)
        if place and falling[place - 1] <= cost:
            continue
        stop = place
        while stop < len(steps) and falling[stop] >= cost:
            stop += 1
        start = place - 1 if place and steps[place - 1] == latency else place
        steps[start:stop], falling[start:stop] = [latency], [cost]
        kept.append(state)
        if len(kept) > MOST_STATES:
            raise UserError(
                f"knapsack: more than {MOST_STATES} states of size and latency; write milp, or greedy for an estimate"
            )
    return np.array(kept, int)


def _traced_back(trail: list[tuple[np.ndarray, np.ndarray]], state: int) -> Choice:
    """The options on the way to the last `state`; of each unit, `trail` has the state before and the option taken."""
    found = []
    for before, option in reversed(trail):
        found.append(option[state])
        state = before[state]
    return np.array(found[::-1], int)
