"""What every allocator must give, whichever it is: one offered width to each unit, within the budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.allocation import ALLOCATORS

# Unit -> width -> bits: sizes grow with the width, units differ in size and need not offer the same widths.
WIDTHS = st.sets(st.integers(1, 8), min_size=1, max_size=4)
UNITS = st.lists(st.tuples(WIDTHS, st.integers(1, 1000), st.integers(0, 500)), min_size=1, max_size=8)


def sizes_of(units):
    return {f"unit_{i}": {b: b * n + extra for b in sorted(w)} for i, (w, n, extra) in enumerate(units)}


def allocated(method, ranking, sizes, budget):
    chosen = ALLOCATORS[method].function(ranking, sizes, budget, ALLOCATORS.options(method, {}))
    assert set(chosen) == set(sizes), "every unit, and no other"
    for unit, width in chosen.items():
        assert width in sizes[unit]
    return chosen, sum(sizes[unit][width] for unit, width in chosen.items())


@pytest.mark.parametrize("method", ALLOCATORS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_unit_gets_one_of_its_widths_and_the_budget_holds(method, data):
    sizes = sizes_of(data.draw(UNITS))
    ranking = data.draw(st.permutations(sorted(sizes)))
    least, most = (sum(end(s.values()) for s in sizes.values()) for end in (min, max))
    budget = data.draw(st.integers(least, most))
    chosen, spent = allocated(method, ranking, sizes, budget)
    assert spent <= budget
    again, _ = allocated(method, ranking, sizes, budget)
    assert again == chosen


@pytest.mark.parametrize("method", ALLOCATORS)
@settings(max_examples=40, deadline=None)
@given(units=UNITS, beyond=st.integers(0, 100))
def test_the_smallest_and_the_largest_budget(method, units, beyond):
    sizes = sizes_of(units)
    least, most = (sum(end(s.values()) for s in sizes.values()) for end in (min, max))
    lowest, _ = allocated(method, sorted(sizes), sizes, least)
    assert lowest == {unit: min(s) for unit, s in sizes.items()}
    highest, _ = allocated(method, sorted(sizes), sizes, most + beyond)
    assert highest == {unit: max(s) for unit, s in sizes.items()}


@pytest.mark.parametrize("method", ALLOCATORS)
def test_the_more_important_of_two_equals_is_raised(method):
    sizes = {unit: {2: 200, 4: 400} for unit in ("a", "b")}
    for ranking in (["a", "b"], ["b", "a"]):
        chosen, _ = allocated(method, ranking, sizes, 600)
        assert chosen == {ranking[0]: 4, ranking[1]: 2}


@pytest.mark.parametrize("method", ALLOCATORS)
def test_nothing_to_decide(method):
    assert allocated(method, [], {}, 0) == ({}, 0)
