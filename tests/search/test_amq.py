"""AMQ on losses that are known: its surrogate, its front, its pins."""

import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from lq.allocation.knapsack import knapsack
from lq.allocation.problem import Problem
from lq.errors import UserError
from lq.search.amq import AMQOptions, amq, pareto, surrogate, widest_gaps

pytestmark = pytest.mark.once

QUICK = {"initial": 40, "evaluations": 8, "population": 40, "inner": 8}


def toy(units=8, seed=0, mean=3.0):
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4])
    weights = rng.choice([16, 43], units)
    cost = rng.lognormal(0, 1, (units, 1)) * 4.0**-bits
    return Problem(cost=cost, size=weights[:, None] * bits, budget=int(mean * weights.sum()))


def run(problem, loss=None, **options):
    asked = []

    def judged(choices, windows):
        assert list(windows) == [0, 1, 2], "all text"
        asked.extend(choices)
        return np.array([(loss or problem.total_cost)(choice) for choice in choices])

    found = list(amq(problem, problem.smallest(), judged, 3, AMQOptions(**{**QUICK, **options})))
    return found, asked


def test_the_surrogate_orders_choices_it_has_not_seen():
    problem, rng = toy(12), np.random.default_rng(1)
    known, unknown = rng.integers(0, 3, (2, 80, 12))
    known = np.unique(known, axis=0)
    found = surrogate(known, np.array([problem.total_cost(choice) for choice in known]))
    truth = [problem.total_cost(choice) for choice in unknown]
    assert spearmanr(found(unknown), truth).statistic > 0.9
    np.testing.assert_allclose(found(known), [problem.total_cost(choice) for choice in known], rtol=1e-6)


def test_the_plan_within_the_budget_is_near_the_best():
    problem = toy()
    found, asked = run(problem, generations=8, pin=None)
    assert len(found) == 8
    assert all(problem.fits(generation.parent) for generation in found)
    assert all(generation.loss == problem.total_cost(generation.parent) for generation in found)
    # 1 + 40 + 8 * 8 of 6561 choices; what is left between is a step of one unit at this size.
    assert len(asked) <= 105
    assert found[-1].loss <= 1.05 * problem.total_cost(knapsack(problem))


def test_the_front_only_grows():
    """The volume that the front dominates never shrinks, and no one on it beats another."""
    problem = toy()
    top = problem.size[:, -1].sum()
    worst = problem.cost[:, 0].sum()

    def volume(front):
        sizes = np.array([problem.total_size(one.choice) for one in front])
        losses = np.array([one.loss for one in front])
        assert (np.diff(sizes) > 0).all()
        assert (np.diff(losses) < 0).all()
        return float((np.diff(np.append(sizes, top)) * (worst - losses)).sum())

    found, _ = run(problem, generations=6, pin=None)
    volumes = [volume(generation.front) for generation in found]
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(volumes))
    losses = [generation.loss for generation in found]
    assert losses == sorted(losses, reverse=True)


def test_nothing_is_evaluated_twice():
    _, asked = run(toy(), generations=4, pin=None)
    assert len({choice.tobytes() for choice in asked[1:]}) == len(asked) - 1, "but the start, perhaps"


def test_units_that_lose_too_much_are_pinned():
    problem = toy()
    problem.cost[5] *= 1000
    found, asked = run(problem, generations=3)
    alone = asked[1:9]
    assert all((choice == 2).sum() == 7 for choice in alone), "one at the lowest level after the other"
    assert all(choice[5] == 2 for choice in asked[9:])
    assert all(one.choice[5] == 2 for one in found[-1].front)
    # No room for pins at the smallest size: they are given up.
    poor = Problem(cost=problem.cost, size=problem.size, budget=int(problem.size[:, 0].sum()))
    found, _ = run(poor, generations=2)
    assert found[-1].parent.tolist() == [0] * 8


def test_units_without_an_option_and_small_spaces():
    cost = np.array([[1.0, np.inf, 0.0], [2.0, 1.0, 0.0], [1.0, np.inf, np.inf]])
    problem = Problem(cost=cost, size=np.array([[2, 3, 4]] * 3), budget=8)
    found, asked = run(problem, generations=3, pin=None)
    assert len(asked) == 1 + 6
    assert all(np.isfinite(problem.cost[np.arange(3), choice]).all() for choice in asked)
    assert problem.total_cost(found[-1].parent) == problem.total_cost(knapsack(problem))
    nothing = Problem(cost=np.ones((2, 1)), size=np.ones((2, 1), int), budget=2)
    found, _ = run(nothing, generations=2)
    assert [generation.parent.tolist() for generation in found] == [[0, 0]] * 2


def test_the_seed_decides():
    problem = toy()
    runs = [[c.tobytes() for c in run(problem, generations=2, seed=seed)[1]] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_fronts_by_hand():
    sizes, losses = np.array([3, 1, 2, 2, 3]), np.array([1.0, 3.0, 2.0, 2.0, 0.5])
    np.testing.assert_array_equal(pareto(sizes, losses), [1, 2, 4])
    assert widest_gaps(np.array([0, 100]), np.array([10, 50, 60, 20]), 3) == [1, 3, 0]
    assert widest_gaps(np.array([0]), np.array([5]), 3) == [0]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"initial": 1}, "initial: 1; write 2 or more"),
        ({"mutation": 1.5}, "mutation: 1.5; write a chance from 0 to 1"),
        ({"pin": 0.0}, "pin: 0.0; write a factor above 0, such as 2, or null"),
    ],
)
def test_options_that_cannot_be(given, line):
    with pytest.raises(UserError) as refused:
        AMQOptions(**given)
    assert str(refused.value) == line
