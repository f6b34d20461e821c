"""Sequential refinement and bisection on losses that are known."""

import itertools
import math

import numpy as np
import pytest

from lq.allocation.knapsack import knapsack
from lq.allocation.problem import Problem
from lq.errors import UserError
from lq.search.bisection import longest_prefix, lowered
from lq.search.refine import RefineOptions, measured_around, refine

pytestmark = pytest.mark.once


def toy(units=10, seed=0, mean=3.0):
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4])
    weights = rng.choice([16, 43], units)
    cost = rng.lognormal(0, 1, (units, 1)) * 4.0**-bits
    return Problem(cost=cost, size=weights[:, None] * bits, budget=int(mean * weights.sum()))


def run(problem, start, loss, **options):
    asked = []

    def judged(choices, windows):
        assert list(windows) == [0, 1], "all text"
        asked.extend(choice.copy() for choice in choices)
        return np.array([loss(choice) for choice in choices])

    return list(refine(problem, start, judged, 2, RefineOptions(**options))), asked


@pytest.mark.parametrize("seed", range(3))
def test_an_additive_loss_is_brought_to_its_least(seed):
    """With all options within reach, one round is enough and the next finds nothing better."""
    problem = toy(seed=seed)
    found, asked = run(problem, problem.smallest(), problem.total_cost, generations=5, reach=2)
    assert found[0].loss == pytest.approx(problem.total_cost(knapsack(problem)), rel=1e-9)
    assert len(found) <= 2
    assert len(asked) <= 1 + (20 + 1) + (20 + 5)


def test_a_step_is_measured_where_the_plan_is():
    problem = toy(4)
    incumbent = np.array([0, 1, 2, 1])
    loss = lambda choices, _: np.array([np.prod(problem.costs_of(choice) + 1) for choice in choices])  # noqa: E731
    (lost,) = loss([incumbent], [])
    cost = measured_around(problem, incumbent, lost, loss, 1, 1)
    for unit, option in itertools.product(range(4), range(3)):
        if abs(option - incumbent[unit]) > 1:
            assert cost[unit, option] == np.inf
            continue
        changed = incumbent.copy()
        changed[unit] = option
        assert cost[unit, option] == pytest.approx(loss([changed], [])[0] - lost, abs=1e-12)


def test_interactions_are_followed_and_nothing_worse_is_kept():
    """Two of four units are low, and the first two together lose ten more, which costs of a clean model cannot know.

    12.1 at first. Measured there, both go up, which counts the ten twice: 7. Then both would be exchanged back; with a
    toll the pair that saves most is alone, the first for the last: 4, which is the least there is.
    """
    low = np.array([1.0, 1.1, 3.0, 4.0])
    problem = Problem(cost=np.stack([low, np.zeros(4)], 1), size=np.array([[2, 4]] * 4), budget=12)

    def loss(choice):
        return float(low @ (choice == 0)) + 10.0 * (choice[0] == choice[1] == 0)

    start = knapsack(problem)
    assert start.tolist() == [0, 0, 1, 1]
    found, _ = run(problem, start, loss, generations=8)
    assert [generation.loss for generation in found] == pytest.approx([7.0, 4.0, 4.0])
    assert [generation.parent.tolist() for generation in found] == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1]]


def test_too_many_steps_at_once_are_taken_back():
    """Every unit alone gains by going up and paying with another; all together lose."""
    size = np.array([[2, 4]] * 6)
    problem = Problem(cost=np.zeros((6, 2)), size=size, budget=18)
    gains = np.array([0.0, 0.0, 0.0, 1.0, 0.9, 0.1])

    def loss(choice):
        return 5.0 - float(gains @ choice) + (10.0 if choice[3:].sum() == 3 else 0.0)

    start = np.array([1, 1, 1, 0, 0, 0])
    found, _ = run(problem, start, loss, generations=2)
    assert found[0].parent[3:].tolist() == [1, 1, 0]


def test_it_ends_where_nothing_is_better():
    problem = toy()
    best = knapsack(problem)
    found, _ = run(problem, best, problem.total_cost, generations=9)
    assert [generation.parent.tolist() for generation in found] == [best.tolist()]
    assert run(problem, best, problem.total_cost, generations=0)[0] == []


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"reach": 0}, "reach: 0; write 1 or more"),
        ({"power": 0.0}, "power: 0.0; write a number above 0, such as 1"),
        ({"allocator": "knapsnack"}, "unknown allocator 'knapsnack'"),
    ],
)
def test_options_that_cannot_be(given, line):
    with pytest.raises(UserError) as refused:
        RefineOptions(**given)
    assert str(refused.value).startswith(line)


# Bisection


@pytest.mark.parametrize("count", range(9))
def test_bisection_finds_the_last_that_holds(count):
    for most in range(count + 1):
        asked = []

        def meets(n):
            asked.append(n)  # noqa: B023
            return n <= most  # noqa: B023

        assert longest_prefix(count, meets) == most
        assert len(asked) <= 1 + math.ceil(math.log2(max(count, 1)))


def test_levels_are_lowered_one_after_the_other():
    """Losses of 1 at 8 bits and 3 at 4 bits, times the place in the list; at most 10 in all."""
    order = [2, 0, 1, 3]
    per_bit = {16: 0, 8: 1, 4: 3}
    options = [16, 8, 4]

    def loss(choice):
        return sum((order.index(unit) + 1) * per_bit[int(bits)] for unit, bits in enumerate(choice))

    assert lowered(order, options, lambda choice: loss(choice) <= 10).tolist() == [8, 8, 8, 8]
    assert lowered(order, options, lambda choice: loss(choice) <= 12).tolist() == [8, 8, 4, 8]
    assert lowered(order, options, lambda choice: loss(choice) <= 7).tolist() == [8, 8, 8, 16]
    assert lowered(order, options, lambda choice: loss(choice) <= 0).tolist() == [16] * 4
    assert lowered(order, options, lambda choice: True).tolist() == [4] * 4
