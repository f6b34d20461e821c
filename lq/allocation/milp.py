"""A `Problem` as an integer linear program, solved by HiGHS through scipy.

One variable in {0, 1} for every option of every unit, of which each unit takes one. HiGHS accepts what violates a
constraint by 1e-6. So costs are scaled to at most 1, and sizes are counted in their greatest common divisor, of which
the budget is a whole number: where that is some hundred thousand at most, half a unit more is far from the next choice.
Where it is larger, a millionth of the room is given away.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, kron

from lq.allocation.problem import DEFAULT, Choice, NoOptions, Problem

TOLERANCE = 1e-6  # of HiGHS
TIME_LIMIT = 60.0  # seconds


def integer_program(problem: Problem, options: NoOptions = DEFAULT) -> Choice:
    """The least cost there is, as an integer linear program. Raises RuntimeError when HiGHS finds none in a minute."""
    del options
    units, widths = problem.cost.shape
    if units == 0:  # HiGHS wants variables
        return problem.smallest()
    offered = problem.offered
    cost = np.where(offered, problem.cost, 0.0)
    cost = cost - np.where(offered, cost, np.inf).min(1, keepdims=True)  # only differences within a unit matter
    size, room = _scaled_sizes(problem)
    found = milp(
        np.where(offered, cost, 0.0).ravel() / max(cost[offered].max(), np.finfo(float).tiny),
        integrality=np.ones(units * widths),
        bounds=Bounds(0, offered.ravel().astype(float)),
        constraints=[
            LinearConstraint(kron(csr_array(np.eye(units)), np.ones((1, widths))), 1, 1),
            LinearConstraint(size.reshape(1, -1), -np.inf, room),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT},
    )
    if found.x is None:
        raise RuntimeError(f"HiGHS: {found.message}")
    return np.argmax(found.x.reshape(units, widths), axis=1)


def _scaled_sizes(problem: Problem) -> tuple[np.ndarray, float]:
    """Sizes above each unit's least, and what there is room for, as shares of the room."""
    least = problem.sizes_of(problem.smallest())
    more = np.where(problem.offered, problem.size - least[:, None], 0)
    unit = max(int(np.gcd.reduce(more, axis=None)), 1)
    room = int(problem.budget - least.sum()) // unit
    if room == 0:
        return (more > 0).astype(float), 0.5
    half = 0.5 / room
    return more / (unit * room), 1 + half if half > 2 * TOLERANCE else 1 - TOLERANCE
