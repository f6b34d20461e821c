"""The evolution of plans on losses that are known: sizes, frequencies, and that it gets there."""

from collections import Counter

import numpy as np
import pytest

from lq.allocation.knapsack import knapsack
from lq.allocation.problem import Problem
from lq.errors import UserError
from lq.search.evolution import EvolutionOptions, evolve, mutated

pytestmark = pytest.mark.once

QUICK = {"survivors": [1], "windows": [1]}


def separable(units=12, seed=0, weights=None, mean=3.0):
    """A loss of sum c_k 4^-b over widths 2 to 5."""
    rng = np.random.default_rng(seed)
    bits = np.arange(2, 6)
    weights = np.full(units, 100) if weights is None else np.asarray(weights)
    cost = rng.lognormal(0, 1.5, (units, 1)) * 4.0**-bits
    return Problem(cost=cost, size=weights[:, None] * bits, budget=int(mean * weights.sum()))


def costs_in(problem):
    """The loss that is the sum of what the problem says."""
    return lambda choices, windows: np.array([problem.total_cost(choice) for choice in choices])


def levels_of(problem):
    return [np.flatnonzero(row) for row in problem.offered]


def test_children_of_equal_units_have_the_size_of_the_parent():
    """One level down for one up, of one to three units: the chances of the least of two draws from 1 to 3."""
    problem, rng = separable(), np.random.default_rng(0)
    parent, flips = np.ones(12, int), Counter()
    for _ in range(3000):
        child = mutated(problem, levels_of(problem), parent, rng)
        assert problem.total_size(child) == problem.budget
        assert np.abs(child - parent).max() <= 1
        flips[int((child < parent).sum())] += 1
    shares = np.array([flips[n] for n in (1, 2, 3)]) / 3000
    np.testing.assert_allclose(shares, [5 / 9, 3 / 9, 1 / 9], atol=4 * np.sqrt(0.25 / 3000))


def test_children_of_unequal_units_never_exceed_the_budget():
    problem = separable(weights=[100, 100, 37, 260, 55, 300], units=6)
    parent, rng = knapsack(problem), np.random.default_rng(0)
    for _ in range(500):
        child = mutated(problem, levels_of(problem), parent, rng)
        assert problem.total_size(child) <= problem.budget
        more = problem.size[np.arange(6), np.minimum(child + 1, 3)] - problem.sizes_of(child)
        raisable = (child < 3) & (child == parent)  # a unit goes up one level at most
        assert (more[raisable] > problem.budget - problem.total_size(child)).all(), "no room is left unused"


@pytest.mark.parametrize("weights", [None, [100, 100, 40, 260, 50, 300, 100, 100, 40, 260, 50, 300]])
def test_a_separable_loss_is_brought_to_its_least(weights):
    problem = separable(weights=weights)
    start, best = np.ones(12, int), problem.total_cost(knapsack(problem))
    options = EvolutionOptions(generations=60, offspring=32, **QUICK)
    losses = [found.loss for found in evolve(problem, start, costs_in(problem), 1, options)]
    assert losses == sorted(losses, reverse=True), "the parent is never given up for a worse one"
    # Where sizes are of five kinds, an exchange that keeps the budget may take more flips than three.
    assert losses[-1] == pytest.approx(best, rel=1e-9 if weights is None else 0.05)


def test_later_stages_judge_fewer_on_more_and_the_parent_again():
    problem, asked, drawn = separable(), [], set()

    def loss(choices, windows):
        asked.extend((len(windows), choice.tobytes()) for choice in choices)
        drawn.add(tuple(windows))
        return costs_in(problem)(choices, windows)

    options = EvolutionOptions(generations=1, offspring=16, survivors=[4, 1], windows=[1, 8])
    start = np.ones(12, int)
    list(evolve(problem, start, loss, 20, options))
    assert Counter(windows for windows, _ in asked) == {1: 16, 8: 5}
    assert (1, start.tobytes()) not in asked
    assert asked[-1] == (8, start.tobytes())
    assert len({child for windows, child in asked if windows == 1}) == 16, "no child twice"
    assert len(drawn) == 2, "of each stage, the same for all"
    assert all(len(set(windows)) == len(windows) and max(windows) < 20 for windows in drawn)


def test_the_seed_decides():
    problem = separable()
    runs = []
    for seed in (0, 0, 1):
        options = EvolutionOptions(generations=5, offspring=8, seed=seed, **QUICK)
        found = evolve(problem, np.ones(12, int), costs_in(problem), 1, options)
        runs.append([generation.parent.tobytes() for generation in found])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_nothing_can_change():
    problem = Problem(cost=np.ones((2, 1)), size=np.ones((2, 1), int), budget=2)
    for stages in (QUICK, {"survivors": [2, 1], "windows": [1, 1]}):
        options = EvolutionOptions(generations=3, offspring=4, **stages)
        found = list(evolve(problem, np.zeros(2, int), lambda choices, _: np.ones(len(choices)), 1, options))
        assert [generation.parent.tolist() for generation in found] == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"generations": -1}, "generations: -1; write 0 or more"),
        ({"survivors": [4, 2]}, "survivors: [4, 2], windows: [1, 8]; write as many of both, the last survivor 1"),
        ({"survivors": [64, 1]}, "survivors: [64, 1] of 32 offspring; write no more than there were before"),
        ({"survivors": ["a", 1]}, "survivors: ['a', 1]; write whole numbers from 1 up, such as [4, 1]"),
        ({"survivors": [0, 1]}, "survivors: [0, 1]; write whole numbers from 1 up"),
        ({"survivors": [True, 1]}, "survivors: [True, 1]; write whole numbers from 1 up"),
        ({"windows": [0, 1]}, "windows: [0, 1]; write whole numbers from 1 up"),
        ({"windows": [1, 2.5]}, "windows: [1, 2.5]; write whole numbers from 1 up"),
        ({"windows": [1]}, "survivors: [4, 1], windows: [1]; write as many of both, the last survivor 1"),
    ],
)
def test_options_that_cannot_be(given, line):
    with pytest.raises(UserError) as refused:
        EvolutionOptions(**given)
    assert str(refused.value).startswith(line)
