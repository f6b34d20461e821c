"""A `Problem` as an integer linear program, solved by HiGHS through scipy.

One variable in {0, 1} for every option of every unit, of which each unit takes one. HiGHS accepts what violates a
constraint by 1e-6. So sizes are counted in their greatest common divisor, of which the budget is a whole number: where
that is some hundred thousand at most, half a unit more is far from the next choice. Where it is larger, a millionth of
the room is given away. Latencies are treated alike. HiGHS also ends within 1e-6 of the least cost, whatever its size:
costs are scaled so that this is 1e-10 of the largest, and what they leave unspent is spent.
"""

import dataclasses

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, kron

from lq.allocation.problem import DEFAULT, Choice, NoOptions, Problem

TOLERANCE = 1e-6  # of HiGHS
LARGEST = 1e4  # cost, as HiGHS is given it
TIME_LIMIT = 60.0  # seconds
INFEASIBLE = 2  # scipy's status


def integer_program(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """The least cost there is, as an integer linear program.

    Raises UserError when budget and limit cannot be met together, RuntimeError when HiGHS finds none in a minute.
    """
    del options
    units, widths = problem.cost.shape
    if units == 0:  # HiGHS wants variables
        return problem.smallest()
    offered = problem.offered
    cost = np.where(offered, problem.cost, 0.0)
    cost = cost - np.where(offered, cost, np.inf).min(1, keepdims=True)  # only differences within a unit matter
    found = milp(
        np.where(offered, cost, 0.0).ravel() * (LARGEST / max(cost[offered].max(), LARGEST * np.finfo(float).tiny)),
        integrality=np.ones(units * widths),
        bounds=Bounds(0, offered.ravel().astype(float)),
        constraints=constraints(problem),
        options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT},
    )
    if found.x is None:
        if found.status == INFEASIBLE and problem.latency is not None:
            return problem.filled(quickest(problem))  # within the millionth that is given away, or refused
        raise RuntimeError(f"HiGHS: {found.message}")
    return problem.filled(np.argmax(found.x.reshape(units, widths), axis=1))


def quickest(problem: Problem) -> Choice:
    """The choice of least latency that the budget allows. Raises UserError when it is above the limit."""
    assert problem.latency is not None
    latency = np.where(problem.offered, problem.latency, np.inf)
    found = integer_program(dataclasses.replace(problem, cost=latency, latency=None, interactions=None))
    if (least := problem.total_latency(found)) > problem.limit:
        raise problem.too_slow(least)
    return found


def constraints(problem: Problem, further: int = 0) -> list[LinearConstraint]:
    """One option for every unit, the budget, and the limit; of the variables `[units * options]` and so many more."""
    units, widths = problem.cost.shape
    rows = [(kron(csr_array(np.eye(units)), np.ones((1, widths))), 1.0, 1.0)]
    shares, room = _scaled(problem, problem.size, problem.budget)
    rows.append((csr_array(shares.reshape(1, -1)), -np.inf, room))
    if problem.latency is not None:
        shares, room = _scaled(problem, problem.latency, problem.limit)
        rows.append((csr_array(shares.reshape(1, -1)), -np.inf, room))
    return [
        LinearConstraint(hstack([matrix, csr_array((matrix.shape[0], further))]) if further else matrix, low, high)
        for matrix, low, high in rows
    ]


def _scaled(problem: Problem, table: np.ndarray, limit: int) -> tuple[np.ndarray, float]:
    """What an option takes above its unit's least, and what there is room for, as shares of the room."""
    least = np.where(problem.offered, table, np.iinfo(np.int64).max).min(1)
    more = np.where(problem.offered, table - least[:, None], 0)
    unit = max(int(np.gcd.reduce(more, axis=None)), 1)
    room = int(limit - least.sum()) // unit
    if room == 0:
        return (more > 0).astype(float), 0.5
    half = 0.5 / room
    return more / (unit * room), 1 + half if half > 2 * TOLERANCE else 1 - TOLERANCE
