"""What every allocator must give, whichever it is: one offered option to each unit, within the budget."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.allocation import ALLOCATORS
from lq.allocation.problem import Problem

pytestmark = pytest.mark.once

# Widths, and of each unit its weights, what it has beside them, and how much it loses.
WIDTHS = st.sets(st.integers(1, 8), min_size=1, max_size=4)
UNITS = st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 500), st.floats(0.01, 100)), min_size=1, max_size=8)

QUICK = {"annealing": {"runs": 8, "proposals": 10}}  # instead of the defaults


def problem_of(units, widths, budget) -> Problem:
    """Sizes grow with the width, and costs fall: four times with every bit."""
    bits = np.array(sorted(widths))
    size = np.array([bits * weights + extra for weights, extra, _ in units], np.int64)
    least, most = size[:, 0].sum(), size[:, -1].sum()
    cost = np.array([loss * 4.0**-bits for _, _, loss in units])
    return Problem(cost=cost, size=size, budget=int(budget(least, most)))


def allocated(method, problem: Problem):
    choice = ALLOCATORS[method].function(problem, ALLOCATORS.options(method, QUICK.get(method, {})))
    assert choice.shape == problem.cost.shape[:1], "every unit, and no other"
    assert ((choice >= 0) & (choice < problem.cost.shape[1])).all()
    return choice


@pytest.mark.parametrize("method", ALLOCATORS)
@settings(max_examples=60, deadline=None)
@given(units=UNITS, widths=WIDTHS, share=st.floats(0, 1))
def test_every_unit_gets_one_of_its_options_and_the_budget_holds(method, units, widths, share):
    problem = problem_of(units, widths, lambda least, most: least + share * (most - least))
    choice = allocated(method, problem)
    assert problem.total_size(choice) <= problem.budget
    np.testing.assert_array_equal(allocated(method, problem), choice)


@pytest.mark.parametrize("method", ALLOCATORS)
@settings(max_examples=60, deadline=None)
@given(
    units=UNITS,
    widths=WIDTHS,
    times=st.lists(st.integers(0, 50), min_size=32, max_size=32),
    one=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    beyond=st.integers(0, 500),
)
def test_a_limit_on_latencies_holds_as_well(method, units, widths, times, one, beyond):
    """Latencies in no relation to sizes; one choice at least meets both."""
    problem = problem_of(units, widths, lambda _, most: most)
    choice = np.minimum(one[: len(units)], len(widths) - 1)
    latency = np.array(times).reshape(8, 4)[: len(units), : len(widths)]
    limit = int(latency[np.arange(len(units)), choice].sum())
    budget = problem.total_size(choice) + beyond
    problem = dataclasses.replace(problem, budget=budget, latency=latency, limit=limit)
    assert problem.fits(allocated(method, problem))


@pytest.mark.parametrize("method", ALLOCATORS)
@settings(max_examples=40, deadline=None)
@given(units=UNITS, widths=WIDTHS, beyond=st.integers(0, 100))
def test_the_smallest_and_the_largest_budget(method, units, widths, beyond):
    assert (allocated(method, problem_of(units, widths, lambda least, _: least)) == 0).all()
    highest = allocated(method, problem_of(units, widths, lambda _, most: most + beyond))
    assert (highest == len(widths) - 1).all()


@pytest.mark.parametrize("method", ALLOCATORS)
def test_the_one_that_loses_more_is_raised(method):
    size = np.array([[200, 400]] * 2)
    for cost, expected in (([[2.0, 1.0], [1.0, 0.5]], [1, 0]), ([[1.0, 0.5], [2.0, 1.0]], [0, 1])):
        problem = Problem(cost=np.array(cost), size=size, budget=600)
        np.testing.assert_array_equal(allocated(method, problem), expected)


@pytest.mark.parametrize("method", ALLOCATORS)
def test_nothing_to_decide(method):
    problem = Problem(cost=np.zeros((0, 2)), size=np.zeros((0, 2), int), budget=0)
    assert allocated(method, problem).shape == (0,)
