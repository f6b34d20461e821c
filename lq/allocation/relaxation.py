"""The linear relaxation of a `Problem`, solved exactly by sorting, and the choices that follow from it.

On the lower convex hull of every unit each further bit saves less than the last. All hull steps of all units, sorted by
what they save per bit, are taken until one does not fit: a share of it would spend the budget exactly, which solves the
linear program (Sinha and Zoltners, 1979). What that step saves per bit is the price of a bit, the Lagrange multiplier:
every unit has the option that minimizes cost + price * size.

A limit on latencies is no part of it: the choices that follow are brought within it afterwards.
"""

import itertools
from typing import NamedTuple

from lq.allocation.latency import settled
from lq.allocation.problem import DEFAULT, Choice, NoOptions, Problem


class Relaxed(NamedTuple):
    """The solution of the linear program, but for the last step."""

    choice: Choice  # what fits of it
    price: float  # cost per bit; 0 where the budget reaches the cheapest option of every unit
    bound: float  # no choice costs less


def relax(problem: Problem) -> Relaxed:
    """Solves the linear relaxation, of the budget alone."""
    choice = problem.smallest()
    left = problem.budget - problem.total_size(choice)
    for saved, size, unit, option in _hull_steps(problem):
        if size > left:
            price = saved / size
            return Relaxed(choice, price, problem.total_cost(choice) - price * left)
        choice[unit] = option
        left -= size
    return Relaxed(choice, 0.0, problem.total_cost(choice))


def lagrangian(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """One price of a bit for all units, the least that the budget allows; then what is left is spent.

    Every unit minimizes cost + price * size.
    """
    del options
    return settled(problem, relax(problem).choice)


def greedy(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """The step of greatest saving per bit first, along the hulls; those that do not fit are passed over."""
    del options
    choice = problem.smallest()
    left, stuck = problem.budget - problem.total_size(choice), set()
    for _, size, unit, option in _hull_steps(problem):
        if unit in stuck or size > left:
            stuck.add(unit)  # its later steps begin where this one ends
            continue
        choice[unit] = option
        left -= size
    return settled(problem, choice)


def _hull_steps(problem: Problem) -> list[tuple[float, int, int, int]]:
    """(cost saved, bits, unit, option it leads to) of every hull step of every unit, most saved per bit first.

    Of steps that save the same the unit that comes first is first, and a unit's own keep their order.
    """
    steps = []
    for unit in range(len(problem.cost)):
        hull = problem.hull(unit)
        for a, b in itertools.pairwise(hull):
            saved = float(problem.cost[unit, a] - problem.cost[unit, b])
            steps.append((saved, int(problem.size[unit, b] - problem.size[unit, a]), unit, b))
    return sorted(steps, key=lambda step: -step[0] / step[1])
