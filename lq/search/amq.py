"""AMQ: the whole Pareto front of size and loss, from few evaluations, with a surrogate that proposes them.

What is known is an archive of choices with what they lose. Every generation

    1  fits a surrogate to it: radial basis functions |x - x'|^3 with a linear tail, of the levels of all units;
    2  lets NSGA-II find the front of size and predicted loss, beginning with the archive's own;
    3  evaluates those of that front that fill the widest gaps between the sizes of the archive's front.

Units that alone at the lowest level, the others at the highest, lose more than `pin` times the median are left at the
highest: fewer to search, and the surrogate need not follow their steep losses. Pins that the budget has no room for are
given up, the least first.

Every generation yields the best of all that was evaluated within the budget, the start among them, and the front.

The authors' settings for a model of 7 billion parameters: 250 choices to begin with, 200 generations of 50 evaluations,
within each 20 generations of 200. They judge by the Jensen-Shannon divergence, and choose the 50 by a genetic algorithm
on the evenness of gaps; here gaps are filled one after the other, the widest first. Crossover is uniform.

Source: Lee et al., arXiv 2509.12019, and their code.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.interpolate import RBFInterpolator

from lq.allocation.problem import Choice, Problem
from lq.errors import UserError
from lq.search.generation import Evaluated, Generation, Loss

Levels = Int[np.ndarray, "choices units"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AMQOptions:
    generations: int = 200
    initial: int = 250  # choices in the archive before the first generation
    evaluations: int = 50  # of a generation
    population: int = 200  # of NSGA-II
    inner: int = 20  # generations of NSGA-II
    crossover: float = 0.9  # chance that a child has two parents
    mutation: float = 0.1  # chance of each unit to be given any level
    pin: float | None = 2.0  # times the median loss; None: nothing is pinned
    seed: int = 0

    def __post_init__(self):
        for name, least in (
            ("generations", 0),
            ("initial", 2),
            ("evaluations", 1),
            ("population", 2),
            ("inner", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)}; write {least} or more")
        for name in ("crossover", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)}; write a chance from 0 to 1")
        if self.pin is not None and not 0 < self.pin < float("inf"):
            raise UserError(f"pin: {self.pin}; write a factor above 0, such as 2, or null")


def amq(problem: Problem, start: Choice, loss: Loss, text: int, options: AMQOptions) -> Iterator[Generation]:
    """AMQ: NSGA-II on a surrogate of the loss, true evaluations where the front has gaps.

    Args:
      problem: options in the order of their sizes in every unit, and the budget; costs are not looked at, but for what
        is not offered.
      start: within the budget.
      loss: of several choices, always asked on all text.
      text: how many windows there are.
      options: of the search.
    """
    rng, space = np.random.default_rng(options.seed), _Space.of(problem)
    judged = lambda levels: loss([space.choice(one) for one in levels], range(text))  # noqa: E731
    incumbent = Evaluated(np.asarray(start).copy(), float(loss([start], range(text))[0]))
    free = ~_pinned(problem, space, judged, options.pin)
    archive = np.array(list(_initial(space, free, options.initial, rng)), int).reshape(-1, len(free))
    losses = judged(archive)
    for _ in range(options.generations):
        predicted = surrogate(archive[:, free], losses)
        front = archive[pareto(space.sizes(archive), losses)]
        proposed = _nsga2(space, front, free, predicted, options, rng)
        known = {levels.tobytes() for levels in archive}
        new = np.array([levels for levels in proposed if levels.tobytes() not in known], int)
        new = new.reshape(-1, len(free))
        new = new[widest_gaps(space.sizes(front), space.sizes(new), options.evaluations)]
        archive, losses = np.concatenate([archive, new]), np.append(losses, judged(new))
        yield _generation(problem, space, archive, losses, incumbent)


class _Space:
    """Levels instead of options: 0 for the smallest a unit is offered, and so on."""

    def __init__(self, problem: Problem, offered: list[np.ndarray]):
        self.problem, self.offered = problem, offered
        self.top = np.array([len(mine) - 1 for mine in offered], int)

    @classmethod
    def of(cls, problem: Problem) -> "_Space":
        return cls(problem, [np.flatnonzero(row) for row in problem.offered])

    def choice(self, levels: np.ndarray) -> Choice:
        return np.array([mine[level] for mine, level in zip(self.offered, levels, strict=True)], int)

    def sizes(self, levels: Levels) -> np.ndarray:
        return np.array([self.problem.total_size(self.choice(one)) for one in levels], np.int64)


def _pinned(
    problem: Problem, space: _Space, judged: Callable[[Levels], np.ndarray], factor: float | None
) -> Bool[np.ndarray, " units"]:
    """Units that stay at their highest level: too much is lost at their lowest. There is room for them."""
    pinned = space.top == 0
    if factor is None or pinned.all():
        return pinned
    lost, alone = np.full(len(pinned), -np.inf), np.flatnonzero(~pinned)
    levels = np.repeat(space.top[None], len(alone), 0)
    levels[np.arange(len(alone)), alone] = 0
    lost[alone] = judged(levels)
    above = lost > factor * np.median(lost[~pinned])
    for unit in np.argsort(lost, kind="stable"):
        levels = np.where(pinned | above, space.top, 0)
        if problem.total_size(space.choice(levels)) <= problem.budget:
            break
        above[unit] = False
    return pinned | above


def _initial(space: _Space, free: np.ndarray, count: int, rng) -> Iterator[np.ndarray]:
    """All units at each level, then random mixtures: levels in random proportions. No two are the same.

    As many as `count`, and as the linear tail of the surrogate takes; fewer where there are no more.
    """
    seen, rows = set(), []
    every = int(np.prod([float(top + 1) for top in space.top[free]], initial=1.0))
    uniform = [
        np.where(free, np.minimum(level, space.top), space.top) for level in range(int(space.top.max(initial=0)) + 1)
    ]
    while len(seen) < every:
        if uniform:
            levels = uniform.pop()
        else:
            shares = rng.dirichlet(np.ones(int(space.top.max()) + 1))
            drawn = rng.choice(len(shares), len(free), p=shares)
            levels = np.where(free, np.minimum(drawn, space.top), space.top)
        if levels.tobytes() in seen:
            continue
        seen.add(levels.tobytes())
        rows.append(levels[free])
        yield levels
        if len(rows) >= count and _full_rank(np.array(rows)):
            return


def _full_rank(rows: np.ndarray) -> bool:
    return np.linalg.matrix_rank(np.column_stack([np.ones(len(rows)), rows])) == rows.shape[1] + 1


def surrogate(archive: Levels, losses: Float[np.ndarray, " choices"]) -> Callable[[Levels], np.ndarray]:
    """The interpolation of what is known: cubic radial basis functions with a linear tail."""
    if not archive.shape[1]:
        return lambda levels: np.full(len(levels), losses.min())
    return RBFInterpolator(archive, losses, kernel="cubic", degree=1)


def _nsga2(space: _Space, front: Levels, free, predicted, options: AMQOptions, rng) -> Levels:
    """The front of size and predicted loss, by NSGA-II (Deb et al., 2002)."""
    extra = [np.where(free, rng.integers(0, space.top + 1), space.top) for _ in range(options.population - len(front))]
    population = np.concatenate([front, np.array(extra, int).reshape(-1, len(free))])[: options.population]
    objectives = np.stack([space.sizes(population), predicted(population[:, free])], axis=1)
    for _ in range(options.inner):
        children = _bred(space, population, _order(objectives), free, options, rng)
        both = np.concatenate([population, children])
        both, first = np.unique(both, axis=0, return_index=True)
        old = np.concatenate([objectives, np.full((len(children), 2), np.nan)])[first]
        fresh = np.isnan(old[:, 0])
        if fresh.any():
            old[fresh] = np.stack([space.sizes(both[fresh]), predicted(both[fresh][:, free])], axis=1)
        kept = np.argsort(_order(old), kind="stable")[: options.population]
        population, objectives = both[kept], old[kept]
    return population[pareto(objectives[:, 0], objectives[:, 1])]


def _bred(space: _Space, population: Levels, place: np.ndarray, free, options: AMQOptions, rng) -> Levels:
    """As many children: winners of two drawn are parents, their levels are mixed, and some changed."""
    count = len(population)

    def parents() -> Levels:
        drawn = rng.integers(count, size=(2, count))
        return population[np.where(place[drawn[0]] <= place[drawn[1]], *drawn)]

    one, other = parents(), parents()
    mixed = (rng.random((count, 1)) < options.crossover) & (rng.random(one.shape) < 0.5)
    children = np.where(mixed, other, one)
    changed = (rng.random(one.shape) < options.mutation) & free
    return np.where(changed, rng.integers(0, space.top + 1, one.shape), children)


def _order(objectives: Float[np.ndarray, "choices 2"]) -> Int[np.ndarray, " choices"]:
    """The place of each: by front, within a front the lonelier first (crowding distance)."""
    count = len(objectives)
    rank, lonely = np.zeros(count, int), np.zeros(count)
    left, front = np.arange(count), 0
    while len(left):
        best = left[pareto(objectives[left, 0], objectives[left, 1])]
        rank[best] = front
        for column in (0, 1):
            sorted_ = best[np.argsort(objectives[best, column], kind="stable")]
            values = objectives[sorted_, column]
            span = max(float(values[-1] - values[0]), np.finfo(float).tiny)
            lonely[sorted_[[0, -1]]] = np.inf
            lonely[sorted_[1:-1]] += (values[2:] - values[:-2]) / span
        left = np.setdiff1d(left, best)
        front += 1
    place = np.empty(count, int)
    place[np.lexsort((-lonely, rank))] = np.arange(count)
    return place


def pareto(sizes: np.ndarray, losses: np.ndarray) -> Int[np.ndarray, " front"]:
    """Those that no other beats in one of both and equals in the other, smallest first; of equals the first."""
    order = np.lexsort((losses, sizes))
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    return order[losses[order] < before]


def widest_gaps(known: np.ndarray, new: np.ndarray, count: int) -> list[int]:
    """Indices of those in `new` that even out the spacing: again and again the one farthest from all sizes so far."""
    distance = np.array([np.abs(known - size).min(initial=np.iinfo(np.int64).max) for size in new], float)
    found: list[int] = []
    while len(found) < min(count, len(new)):
        which = int(np.argmax(distance))
        found.append(which)
        distance = np.minimum(distance, np.abs(new - new[which]))
        distance[found] = -1.0
    return found


def _generation(problem: Problem, space: _Space, archive: Levels, losses, incumbent: Evaluated) -> Generation:
    sizes = space.sizes(archive)
    front = tuple(Evaluated(space.choice(archive[i]), float(losses[i])) for i in pareto(sizes, losses))
    best = min([incumbent, *(one for one in front if problem.fits(one.choice))], key=lambda one: one.loss)
    return Generation(best.choice, best.loss, front)
