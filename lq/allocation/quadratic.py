"""Quadratic programs: costs of units and of pairs of them, as IMPQ, CoopQ and CLADO have them.

    minimize  sum over k of cost[k, x_k]  +  sum over pairs of term[x_a, x_b]

under the same budget. HiGHS takes linear objectives only. What a pair loses is written against the last option r,

    term[o, q] = v[o, q] + term[o, r] + term[r, q] - term[r, r],      v = 0 in the row and the column r,

whose last three belong to the units. For every v that is not 0 a variable y stands for "a has o and b has q", with the
rows that bind, x being indicators:

    v > 0, y wants to be small:    y[o, q] >= x_a[o] + x_b[q] - 1
    v < 0, y wants to be large:    sum over q of y[o, q] <= x_a[o],    sum over o of y[o, q] <= x_b[q],

the sums over the v < 0 of the pair: a has one option, so that they are as good as row by row, and cut off more.

HiGHS proves its answer or a bound within its minute. Beside it a local search goes from several starts to choices that
no change of one or two units improves, two at a time because what one gains another must pay; the better is taken.

Sources: IMPQ/CoopQ (arXiv 2509.15455), two options; CLADO (arXiv 2307.05657), any number.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lq.allocation.interactions import psd_projected
from lq.allocation.milp import INFEASIBLE, LARGEST, TIME_LIMIT, constraints, integer_program, quickest
from lq.allocation.problem import Choice, Interactions, Problem
from lq.allocation.relaxation import greedy
from lq.errors import UserError

NOISE = 1e-12  # of the largest term or cost: what is less is rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadraticOptions:
    psd: bool = False  # without the negative eigenvalues of the objective, as CLADO
    time_limit: float = TIME_LIMIT  # seconds, of HiGHS; 0 for the local search alone
    starts: int = 8  # of the local search
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.time_limit < float("inf"):
            raise UserError(f"time_limit: {self.time_limit}; write seconds, such as 60")
        if self.starts < 1 or self.seed < 0:
            raise UserError(f"starts: {self.starts}, seed: {self.seed}; write 1 or more and 0 or more")


class Solved(NamedTuple):
    """A choice, what it costs with its pairs, and what none costs less than; the gap is between these."""

    choice: Choice
    objective: float
    bound: float


def quadratic(problem: Problem, options: QuadraticOptions | None = None) -> Choice:
    """The least cost, interactions of pairs included: HiGHS on a linearized program, and local search (IMPQ, CLADO)."""
    return solve_quadratic(problem, options).choice


def solve_quadratic(problem: Problem, options: QuadraticOptions | None = None) -> Solved:
    """As `quadratic`, with the objective and the bound. They are equal, but for rounding, where HiGHS has finished.

    Raises UserError when budget and limit cannot be met together.
    """
    options = options or QuadraticOptions()
    if options.psd:
        problem = psd_projected(problem)
    if problem.interactions is None or not problem.interactions.terms.any():
        choice = integer_program(problem)
        return Solved(choice, problem.objective(choice), problem.objective(choice))
    best = local_search(problem, options.starts, options.seed)
    bound = -np.inf
    if options.time_limit:
        found, bound = _linearized(problem, options.time_limit)
        if found is not None and problem.objective(found := improved(problem, found)) < problem.objective(best):
            best = found
    return Solved(best, problem.objective(best), min(bound, problem.objective(best)))


def local_search(problem: Problem, starts: int = 8, seed: int = 0) -> Choice:
    """The best of several choices that no change of one unit or two improves.

    The first start is greedy by the costs alone; the others by the costs of an option while the rest is as in the best
    so far, each times a random factor around 1.
    """
    rng = np.random.default_rng(seed)
    best = improved(problem, greedy(problem))
    for _ in range(starts - 1):
        around = _marginal(problem, best)
        around = around - np.where(problem.offered, around, np.inf).min(1, keepdims=True)
        noisy = np.where(problem.offered, around * rng.lognormal(0, 0.5, around.shape), np.inf)
        found = improved(problem, greedy(dataclasses.replace(problem, cost=noisy)))
        if problem.objective(found) < problem.objective(best):
            best = found
    return best


def improved(problem: Problem, choice: Choice) -> Choice:
    """`choice` after changes of one unit, or of two at once, that improve it, until there is none."""
    choice, pairs = choice.copy(), problem.interactions
    partners: list[list[tuple[int, np.ndarray]]] = [[] for _ in choice]
    scale = max(float(np.abs(problem.cost[problem.offered]).max(initial=0)), np.finfo(float).tiny)
    if pairs is not None:
        for (a, b), term in zip(pairs.pairs.tolist(), pairs.terms, strict=True):
            partners[a].append((b, term))
            partners[b].append((a, term.T))
        scale = max(scale, float(np.abs(pairs.terms).max(initial=0)))
    least = NOISE * scale
    moved = True
    while moved:
        moved = False
        for unit in range(len(choice)):
            if (move := _best_move(problem, choice, unit, partners[unit], least)) is not None:
                for where, option in move:
                    choice[where] = option
                moved = True
    return choice


def _best_move(problem: Problem, choice: Choice, unit: int, partners, least: float) -> list[tuple[int, int]] | None:
    """The change of `unit`, alone or with one other, that saves most; None where none saves `least`."""
    marginal = _marginal(problem, choice)
    delta = marginal - marginal[np.arange(len(choice)), choice][:, None]  # [units, options]
    together = np.zeros((problem.cost.shape[1], *delta.shape))  # [option of unit, other unit, its option]
    for other, term in partners:
        mine, its = choice[unit], choice[other]
        together[:, other, :] = term - term[:, its][:, None] - term[mine] + term[mine, its]
    total = delta[unit][:, None, None] + delta + together
    total[:, unit, :] = np.inf
    # Another unit that keeps its option has delta and interaction 0: changes of one unit are among these.
    fits = problem.offered[unit][:, None, None] & problem.offered
    for table, left in _resources(problem, choice):
        fits = fits & (table[unit][:, None, None] + table <= left)
    total = np.where(fits, total, np.inf)
    if len(choice) == 1:
        total = np.where(problem.within(choice)[unit], delta[unit], np.inf)[:, None, None]
    option, other, its = np.unravel_index(np.argmin(total), total.shape)
    if not total[option, other, its] < -least:
        return None
    return [(unit, int(option))] if len(choice) == 1 else [(unit, int(option)), (int(other), int(its))]


def _resources(problem: Problem, choice: Choice):
    """Of the size and of the latency: what every option takes more than the choice, and what is left."""
    yield problem.size - problem.sizes_of(choice)[:, None], problem.budget - problem.total_size(choice)
    if problem.latency is not None:
        left = problem.limit - problem.total_latency(choice)
        yield problem.latency - problem.latencies_of(choice)[:, None], left


def _marginal(problem: Problem, choice: Choice) -> np.ndarray:
    """What every option of every unit costs while all others are as in `choice`; infinite where it is not offered."""
    return problem.cost + (problem.interactions.field(choice) if problem.interactions else 0.0)


def _linearized(problem: Problem, time_limit: float) -> tuple[Choice | None, float]:
    """What HiGHS finds in the time it has, None where that is nothing, and its bound."""
    assert problem.interactions is not None
    (units, options), offered = problem.cost.shape, problem.offered
    cost, v, constant = _reduced(problem, problem.interactions)
    least = np.where(offered, cost, np.inf).min(1, keepdims=True)
    cost = np.where(offered, cost - least, 0.0)
    largest = max(float(np.abs(cost).max()), float(np.abs(v).max()), LARGEST * np.finfo(float).tiny)
    pair, o, q = np.nonzero(np.abs(v) > NOISE * largest)
    scale = largest / LARGEST
    a, b = problem.interactions.pairs[pair].T
    value = v[pair, o, q]
    found = milp(
        np.concatenate([cost.ravel(), value]) / scale,
        integrality=np.concatenate([np.ones(units * options), np.zeros(len(value))]),
        bounds=Bounds(0, np.concatenate([offered.ravel().astype(float), np.ones(len(value))])),
        constraints=[
            *constraints(problem, further=len(value)),
            *_coupling(value, pair, o, q, a * options + o, b * options + q, units * options),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": time_limit},
    )
    bound = -np.inf if found.mip_dual_bound is None else found.mip_dual_bound * scale + float(least.sum()) + constant
    if found.x is None:
        if found.status == INFEASIBLE and problem.latency is not None:
            quickest(problem)
        return None, bound
    return np.argmax(found.x[: units * options].reshape(units, options), axis=1), bound


def _reduced(problem: Problem, interactions: Interactions) -> tuple[np.ndarray, np.ndarray, float]:
    """Costs of units, v, and a constant whose sum is the objective; v is 0 in its last row and column."""
    cost, term = np.where(problem.offered, problem.cost, 0.0), interactions.terms
    a, b = interactions.pairs.T
    np.add.at(cost, a, term[:, :, -1])
    np.add.at(cost, b, term[:, -1, :])
    v = term - term[:, :, -1:] - term[:, -1:, :] + term[:, -1:, -1:]
    offered = problem.offered[a][:, :, None] & problem.offered[b][:, None, :]
    return cost, np.where(offered, v, 0.0), -float(term[:, -1, -1].sum())


def _coupling(value, pair, o, q, x_a, x_b, first: int) -> list[LinearConstraint]:
    """The rows that tie y to x: one for every v above 0, and for those below one for each option of either unit."""
    columns = first + len(value)
    y = first + np.arange(len(value))
    above, below = np.flatnonzero(value > 0), np.flatnonzero(value < 0)
    found = []
    if len(above):
        rows, ones = np.arange(len(above)), np.ones(len(above))
        entries = np.concatenate([ones, ones, -ones])
        where = np.tile(rows, 3), np.concatenate([x_a[above], x_b[above], y[above]])
        found.append(LinearConstraint(csr_array((entries, where), (len(above), columns)), -np.inf, 1.0))
    for option, x in ((o, x_a), (q, x_b)):
        if not len(below):
            break
        keys = np.stack([pair[below], option[below]], axis=1)
        distinct, first_of, row = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        row = row.ravel()
        entries = np.concatenate([np.ones(len(below)), -np.ones(len(distinct))])
        where = np.concatenate([row, np.arange(len(distinct))]), np.concatenate([y[below], x[below][first_of]])
        found.append(LinearConstraint(csr_array((entries, where), (len(distinct), columns)), -np.inf, 0.0))
    return found
