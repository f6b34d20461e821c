"""The rules with a formula: reverse water-filling, proportional widths, and how real widths become options."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.allocation.annealing import AnnealingOptions, annealing
from lq.allocation.knapsack import knapsack
from lq.allocation.problem import Problem
from lq.allocation.proportional import ProportionalOptions, proportional, shifted, winsorized
from lq.allocation.rounding import frontier, rounded
from lq.allocation.water_filling import reverse_water_filling, water_filling
from lq.errors import UserError

pytestmark = pytest.mark.once


def falling(losses, bits, weights=None, budget=0.0) -> Problem:
    """Units that lose r 4^-b; `budget` in bits per weight."""
    weights = np.full(len(losses), 1000) if weights is None else np.asarray(weights)
    bits = np.asarray(bits)
    cost = np.asarray(losses, float)[:, None] * 4.0**-bits
    return Problem(cost=cost, size=weights[:, None] * bits, budget=int(budget * weights.sum()))


# Reverse water-filling


def test_water_filling_by_hand():
    """At two bits (64, 4, 1, 1/4) all lose 2^-2.5 per weight; with bounds from 1 to 4 three of them are at a bound."""
    c = np.array([64, 4, 1, 0.25])
    widths = reverse_water_filling(c, 2.0, 0.0, 16.0)
    np.testing.assert_allclose(widths, [4.25, 2.25, 1.25, 0.25], atol=1e-12)
    np.testing.assert_allclose(c * 4.0**-widths, 2**-2.5, rtol=1e-12)
    ratio = (c * 4.0**-2).mean() / (c * 4.0**-widths).mean()
    assert ratio == pytest.approx(c.mean() / np.exp(np.log(c).mean()), rel=1e-12)
    assert ratio == pytest.approx(6.1209, abs=5e-5)
    np.testing.assert_allclose(reverse_water_filling(c, 2.0, 1.0, 4.0), [4, 2, 1, 1], atol=1e-12)


@pytest.mark.parametrize("slope", [1.6, 2.0])
def test_equal_losses_get_equal_widths(slope):
    np.testing.assert_allclose(reverse_water_filling(np.full(7, 3.3), 2.5, 1, 8, slope), 2.5, rtol=1e-12)


@pytest.mark.parametrize(("low", "high", "mean"), [(1, 8, 3.0), (2, 4, 3.3), (0, 16, 2.0), (1, 8, 7.9), (3, 3, 3.0)])
@pytest.mark.parametrize("slope", [1.6, 2.0, None])
def test_water_filling_satisfies_the_conditions_of_an_optimum(low, high, mean, slope):
    """The mean is met, and a bit is worth the same per weight, less where `low` holds, more where `high` does."""
    rng = np.random.default_rng(0)
    c, sizes = np.exp(2.0 * rng.standard_normal(301)), rng.uniform(1, 50, 301)
    slopes = np.full(301, slope) if slope else rng.uniform(1, 3, 301)
    widths = reverse_water_filling(c, mean, low, high, slope or slopes, sizes)
    assert (sizes * widths).sum() / sizes.sum() == pytest.approx(mean, rel=1e-12)
    worth = c * slopes * 2.0 ** (-slopes * widths)
    free = (widths > low) & (widths < high)
    if not free.any():
        return
    level = worth[free].mean()
    np.testing.assert_allclose(worth[free], level, rtol=1e-9)
    assert (worth[widths == low] <= level * (1 + 1e-9)).all()
    assert (worth[widths == high] >= level * (1 - 1e-9)).all()


def test_no_whole_widths_lose_less():
    rng = np.random.default_rng(1)
    for _ in range(20):
        c, sizes = rng.lognormal(0, 1.5, 5), rng.integers(1, 6, 5)
        total = lambda widths: (sizes * c * 4.0 ** -np.asarray(widths)).sum()  # noqa: B023, E731
        mean = 2.4
        every = (w for w in itertools.product(range(1, 5), repeat=5) if np.dot(sizes, w) <= mean * sizes.sum())
        assert total(reverse_water_filling(c, mean, 1, 4, sizes=sizes)) <= min(map(total, every)) * (1 + 1e-9)


def test_what_loses_nothing_gets_the_least_bits():
    np.testing.assert_allclose(reverse_water_filling(np.array([0.0, 1, 1, 0]), 3.0, 1, 8), [1, 5, 5, 1], atol=1e-9)


def test_a_mean_out_of_bounds_is_refused():
    with pytest.raises(UserError, match="widths from 4 to 8 of mean 3; write a mean between them"):
        reverse_water_filling(np.ones(4), 3, 4, 8)


def test_units_get_the_widths_of_the_closed_form():
    """Where these are whole. r is n c: the large unit of the same loss in all is the less important per weight."""
    problem = falling([64.0, 4.0, 1.0, 1.0], [1, 2, 3, 4], budget=2.0)
    np.testing.assert_array_equal(water_filling(problem), [3, 1, 0, 0])
    # c = (16, 1, 1) / 100: two bits apart, (4.03, 2.03, 2.03); at the bound (4, 2.03, 2.03).
    problem = falling([16.0, 4.0, 4.0], [1, 2, 3, 4], weights=[100, 400, 400], budget=2.25)
    np.testing.assert_array_equal(water_filling(problem), [3, 1, 1])


@settings(max_examples=100, deadline=None)
@given(
    losses=st.lists(st.floats(0.01, 100), min_size=2, max_size=6),
    weights=st.lists(st.integers(1, 50), min_size=6, max_size=6),
    mean=st.floats(1, 6),
)
def test_units_lose_little_more_than_at_best(losses, weights, mean):
    """The real widths lose no more than the best whole ones, and rounded down by a bit at most they lose four times."""
    problem = falling(losses, range(1, 7), weights[: len(losses)], mean)
    choice = water_filling(problem)
    assert problem.fits(choice)
    assert problem.total_cost(choice) <= 4 * problem.total_cost(knapsack(problem)) * (1 + 1e-9)


def test_measured_losses_at_and_below_zero():
    cost = np.array([[1.0, 0.1, -1e-4], [1.0, 0.2, 0.0], [-1e-5, 0.0, 1e-6], [0.0, 0.0, 0.0]])
    problem = Problem(cost=cost, size=np.array([[2, 3, 4]] * 4), budget=10)
    assert problem.fits(choice := water_filling(problem))
    assert choice[2] == 0
    assert choice[3] == 0


# Proportional


def test_scores_are_stretched_between_percentiles():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 100.0])
    np.testing.assert_allclose(winsorized(scores, 0.0), scores / 100)
    np.testing.assert_allclose(winsorized(scores, 0.25), [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(winsorized(np.ones(3), 0.05), [0, 0, 0])


def test_the_shift_spends_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(20):
        places, span = rng.uniform(0, 1, 9), rng.uniform(1, 9, 9)
        room = rng.uniform(0, span.sum())
        found = shifted(places, span, room)
        assert (span * found).sum() == pytest.approx(room, rel=1e-9)
        free = (found > 0) & (found < 1)
        assert np.ptp((found - places)[free]) < 1e-9 if free.any() else True


def test_widths_are_linear_in_the_score():
    """Scores 0, 1/2, 1 of the same size and a mean of 3 of 2 to 4 bits: 2, 3 and 4; with half the spread 2.5 to 3.5."""
    cost = np.array([[2.0, 1.0, 0.0], [3.0, 1.5, 0.0], [4.0, 2.0, 0.0]])
    problem = Problem(cost=cost, size=np.array([[200, 300, 400]] * 3), budget=900)
    np.testing.assert_array_equal(proportional(problem, ProportionalOptions(cut=0.0)), [0, 1, 2])
    # 2.5, 3, 3.5: the first of those that lost a half goes up.
    np.testing.assert_array_equal(proportional(problem, ProportionalOptions(cut=0.0, spread=0.5)), [1, 1, 1])
    np.testing.assert_array_equal(proportional(problem, ProportionalOptions(spread=0.0)), [1, 1, 1])


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.floats(0.01, 100), min_size=1, max_size=10), mean=st.floats(2, 5))
def test_more_important_units_of_one_size_get_no_less(losses, mean):
    """With no cut, which makes equals of the ends, and steps of one size, of which none is left over."""
    choice = proportional(falling(losses, [2, 3, 4, 5], budget=mean), ProportionalOptions(cut=0.0))
    by_loss = {loss: set(choice[np.array(losses) == loss]) for loss in losses}
    assert all(max(by_loss[a]) <= min(by_loss[b]) for a, b in itertools.pairwise(sorted(by_loss)))


@pytest.mark.parametrize(
    ("given_", "line"),
    [({"spread": -1.0}, "spread: -1.0; write 0 or more, such as 1"), ({"cut": 0.5}, "cut: 0.5; write a share below")],
)
def test_options_that_cannot_be(given_, line):
    with pytest.raises(UserError) as refused:
        ProportionalOptions(**given_)
    assert str(refused.value).startswith(line)


# Rounding


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    places=st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_rounding_spends_the_budget_but_for_a_step(weights, places):
    places = np.array(places[: len(weights)])
    problem = falling(np.ones(len(weights)), [2, 3, 4], weights, 4.0)
    budget = int(sum(w * (2 + 2 * p) for w, p in zip(weights, places, strict=True)))
    problem = Problem(cost=problem.cost, size=problem.size, budget=max(budget, 2 * sum(weights)))
    choice = rounded(problem, places)
    assert problem.fits(choice)
    steps = [w for w, option in zip(weights, choice, strict=True) if option < 2]
    assert not steps or problem.budget - problem.total_size(choice) < min(steps)


def test_options_that_others_undercut_are_no_widths():
    cost, size = np.array([[3.0, 2.0, 2.5, 2.0, np.inf, 1.0]]), np.array([[10, 20, 20, 30, 35, 40]])
    assert frontier(Problem(cost=cost, size=size, budget=10), 0) == [0, 1, 5]


# Annealing


@pytest.mark.parametrize("seed", range(3))
def test_annealing_at_norm_2_finds_the_least_sum_of_costs(seed):
    rng = np.random.default_rng(seed)
    problem = falling(rng.lognormal(0, 1.5, 12), [2, 3, 4, 6], rng.choice([16, 43], 12), 3.0)
    choice = annealing(problem, AnnealingOptions(norm=2.0, runs=16, proposals=60))
    assert problem.fits(choice)
    # One unit changes at a time: an exchange at the edge of the budget goes by a worse choice, and some are not made.
    assert problem.total_cost(choice) <= problem.total_cost(knapsack(problem)) * 1.05


def test_a_larger_norm_protects_the_worst():
    """With norm 2 the small losses of many outweigh the one; with norm 8 they do not."""
    cost = np.array([[1.0, 0.6]] + [[0.3, 0.0]] * 3)
    problem = Problem(cost=cost, size=np.array([[2, 8]] + [[2, 4]] * 3), budget=14)
    np.testing.assert_array_equal(annealing(problem, AnnealingOptions(norm=2.0)), [0, 1, 1, 1])
    np.testing.assert_array_equal(annealing(problem, AnnealingOptions(norm=8.0)), [1, 0, 0, 0])


def test_the_seed_decides():
    problem = falling(np.random.default_rng(0).lognormal(0, 1.5, 30), [2, 3, 4], budget=3.0)
    runs = [annealing(problem, AnnealingOptions(runs=2, proposals=1, norm=2.0, seed=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


@pytest.mark.parametrize(
    "given_", [{"runs": 0}, {"proposals": 0}, {"coldest": 3.0}, {"coldest": 0.0}, {"norm": 0.0}, {"seed": -1}]
)
def test_annealing_that_cannot_be(given_):
    with pytest.raises(UserError, match=f"^{next(iter(given_))}: .*; write"):
        AnnealingOptions(**given_)
