"""EvoPress: elitist evolution of a plan within its size (Sieberling et al., arXiv 2410.14649).

Every generation makes `offspring` children of the parent. A child has min(u, v) flips, u and v from 1 to 3: each takes
one unit a step down and one or more others up, as far as the size allows. Children are then judged in stages, each on
more text than the one before and with fewer of them left; the parent joins in the last. The best is the next parent.

Text is drawn anew for every stage, so that no child lives on luck for long: the parent is judged again too.

The authors flip levels between matrices of equal size, where the size stays the same to the bit. Here units may be of
any size: what was taken down makes room, which is filled at random; a child may be smaller than the budget and never
larger.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from lq.allocation.problem import Choice, Problem
from lq.errors import UserError
from lq.search.generation import Generation, Loss

MOST_FLIPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionOptions:
    """The authors' settings for large models: 150 generations of 128, survivors 16, 4, 1 on 2, 16 and 128 thousand
    tokens; their quick one: 400 of 16, survivors 1, 1 on 512 and 8 thousand."""

    generations: int = 150
    offspring: int = 32
    survivors: list[int] = dataclasses.field(default_factory=lambda: [4, 1])  # of each stage; the last is 1
    windows: list[int] = dataclasses.field(default_factory=lambda: [1, 8])  # of text, in each stage
    seed: int = 0

    def __post_init__(self):
        for name, least in (("generations", 0), ("offspring", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)}; write {least} or more")
        for name in ("survivors", "windows"):
            numbers = getattr(self, name)
            if any(type(number) is not int or number < 1 for number in numbers):
                raise UserError(f"{name}: {numbers}; write whole numbers from 1 up, such as [4, 1]")
        falling = [self.offspring, *self.survivors]
        if len(self.survivors) != len(self.windows) or not self.survivors or self.survivors[-1] != 1:
            raise UserError(
                f"survivors: {self.survivors}, windows: {self.windows}; write as many of both, the last survivor 1"
            )
        if any(after > before for before, after in itertools.pairwise(falling)):
            raise UserError(
                f"survivors: {self.survivors} of {self.offspring} offspring; write no more than there were before"
            )


def evolve(problem: Problem, start: Choice, loss: Loss, text: int, options: EvolutionOptions) -> Iterator[Generation]:
    """EvoPress: generations of exchanged widths, judged on more and more text with fewer and fewer left.

    Yields the parent behind every generation, `start` being the first.

    Args:
      problem: options with their sizes, in the order of their sizes in every unit, and the budget; costs are not
        looked at, but for what is not offered.
      start: within the budget.
      loss: of several choices.
      text: how many windows there are. Those of a stage are the same for all that are judged in it.
      options: of the search.
    """
    levels = [np.flatnonzero(row) for row in problem.offered]
    rng, parent = np.random.default_rng(options.seed), np.asarray(start).copy()
    for _ in range(options.generations):
        children = list(_children(problem, levels, parent, options.offspring, rng))
        found = np.inf
        for stage, (survivors, windows) in enumerate(zip(options.survivors, options.windows, strict=True)):
            if stage == len(options.survivors) - 1:
                children.append(parent)
            if not children:  # nothing but the parent is of this size
                continue
            losses = loss(children, rng.permutation(text)[:windows].tolist())
            order = np.argsort(losses, kind="stable")[:survivors]
            children, found = [children[i] for i in order], float(losses[order[0]])
        parent = children[0]
        yield Generation(parent, found)


def _children(problem: Problem, levels: Sequence[np.ndarray], parent: Choice, count: int, rng) -> Iterator[Choice]:
    """Children that differ from the parent and from each other; fewer than `count` where hardly any exist."""
    seen = {parent.tobytes()}
    for _ in range(8 * count):
        child = mutated(problem, levels, parent, rng)
        if child.tobytes() not in seen:
            seen.add(child.tobytes())
            yield child
        if len(seen) > count:
            return


def mutated(problem: Problem, levels: Sequence[np.ndarray], parent: Choice, rng: np.random.Generator) -> Choice:
    """The parent with one to three units a level down, and others up as long as there is room."""
    level = np.array([np.searchsorted(mine, option) for mine, option in zip(levels, parent, strict=True)])
    tops = np.array([len(mine) - 1 for mine in levels])
    flips = min(rng.integers(1, MOST_FLIPS + 1, 2))
    lowered = rng.permutation(np.flatnonzero(level > 0))[:flips]
    level[lowered] -= 1
    left = problem.budget - problem.total_size(_options_at(levels, level))
    for unit in rng.permutation(np.setdiff1d(np.flatnonzero(level < tops), lowered)):
        step = int(problem.size[unit, levels[unit][level[unit] + 1]] - problem.size[unit, levels[unit][level[unit]]])
        if step <= left:
            level[unit] += 1
            left -= step
    return _options_at(levels, level)


def _options_at(levels: Sequence[np.ndarray], level: np.ndarray) -> Choice:
    return np.array([mine[i] for mine, i in zip(levels, level, strict=True)], int)
