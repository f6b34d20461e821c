"""Costs of pairs: enumeration, the published numbers, the local search, and the projection."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.allocation import allocate
from lq.allocation.interactions import costs_beside, interactions_of, psd_projected
from lq.allocation.milp import integer_program
from lq.allocation.pins import Pin
from lq.allocation.problem import Interactions, Problem
from lq.allocation.quadratic import QuadraticOptions, improved, local_search, quadratic, solve_quadratic
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.numerics.spec import QuantSpec

pytestmark = pytest.mark.once


def objective(problem, choice) -> float:
    """By definition, in Python."""
    total = sum(problem.cost[unit, option] for unit, option in enumerate(choice))
    for (a, b), term in zip(problem.interactions.pairs, problem.interactions.terms, strict=True):
        total += term[choice[a], choice[b]]
    return float(total)


def fitting(problem):
    units, options = problem.cost.shape
    choices = itertools.product(range(options), repeat=units)
    return [c for c in map(np.array, choices) if problem.fits(c) and np.isfinite(problem.total_cost(c))]


def random_problem(seed, units=5, options=3, share=0.5, density=1.0, latency=False) -> Problem:
    rng = np.random.default_rng(seed)
    bits = np.arange(2, 2 + options)
    cost = rng.lognormal(0, 1, (units, 1)) * 4.0 ** -(bits - 2)
    size = rng.choice([16, 43], units)[:, None] * bits
    pairs = np.array([p for p in itertools.combinations(range(units), 2) if rng.random() < density]).reshape(-1, 2)
    terms = rng.normal(0, 0.5, (len(pairs), options, options))
    least, most = size[:, 0].sum(), size[:, -1].sum()
    times = rng.integers(0, 20, size.shape) if latency else None
    return Problem(
        cost=cost,
        size=size,
        budget=int(least + share * (most - least)),
        interactions=Interactions(pairs=pairs, terms=terms),
        latency=times,
        limit=int(times[:, 0].sum() + 5) if latency else 0,
    )


@pytest.mark.parametrize("latency", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_small_programs_are_solved_as_by_enumeration(seed, latency):
    problem = random_problem(seed, share=0.2 + 0.05 * seed, density=0.7, latency=latency)
    best = min(objective(problem, choice) for choice in fitting(problem))
    solved = solve_quadratic(problem, QuadraticOptions(starts=1))
    assert problem.fits(solved.choice)
    assert solved.objective == pytest.approx(objective(problem, solved.choice), abs=1e-12)
    # HiGHS ends within 1e-10 of the largest coefficient, which is below ten, and its indicators are whole to 1e-6.
    assert solved.objective == pytest.approx(best, abs=1e-5)
    assert solved.bound == pytest.approx(best, abs=1e-5)


def test_ten_units_of_two_options():
    problem = random_problem(3, units=10, options=2)
    best = min(objective(problem, choice) for choice in fitting(problem))
    assert objective(problem, quadratic(problem)) == pytest.approx(best, abs=1e-5)


def test_options_that_a_unit_lacks():
    problem = random_problem(0, units=4)
    cost = problem.cost.copy()
    cost[0, 2] = cost[1, 0] = np.inf
    problem = dataclasses.replace(problem, cost=cost)
    best = min(objective(problem, choice) for choice in fitting(problem))
    assert objective(problem, quadratic(problem)) == pytest.approx(best, abs=1e-5)
    assert objective(problem, local_search(problem)) >= best - 1e-12


def test_without_interactions_it_is_the_integer_program():
    problem = random_problem(1)
    for none in (None, dataclasses.replace(problem.interactions, terms=np.zeros_like(problem.interactions.terms))):
        alone = dataclasses.replace(problem, interactions=none)
        np.testing.assert_array_equal(quadratic(alone), integer_program(alone))


def test_published_numbers():
    """phi = (1, 2, 3) and its covariance: two of the units low cost 3.55, 4.6 and 5.65;
    the budget keeps one high."""
    cost = np.array([[1.15, 0.0], [2.3, 0.0], [3.45, 0.0]])
    terms = np.zeros((2, 2, 2))
    terms[:, 0, 0] = [0.1, -0.1]
    interactions = Interactions(pairs=np.array([[0, 1], [1, 2]]), terms=terms)
    problem = Problem(cost=cost, size=np.array([[2, 4]] * 3), budget=8, interactions=interactions)
    solved = solve_quadratic(problem)
    np.testing.assert_array_equal(solved.choice, [0, 0, 1])
    assert solved.objective == pytest.approx(3.55, abs=1e-12)
    assert problem.objective(np.array([0, 1, 0])) == pytest.approx(4.6, abs=1e-12)
    assert problem.objective(np.zeros(3, int)) == pytest.approx(6.9, abs=1e-12)


def test_a_pair_that_must_not_be_low_together():
    """The costs alone would lower both of the first; together they lose ten more."""
    terms = np.zeros((1, 2, 2))
    terms[0, 0, 0] = 10.0
    problem = Problem(
        cost=np.array([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]),
        size=np.array([[2, 4]] * 3),
        budget=8,
        interactions=Interactions(pairs=np.array([[0, 1]]), terms=terms),
    )
    np.testing.assert_array_equal(integer_program(problem), [0, 0, 1])
    assert sorted(quadratic(problem)[:2]) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), latency=st.booleans())
def test_no_change_of_one_unit_or_two_improves_what_the_search_finds(seed, share, latency):
    problem = random_problem(seed, share=share, latency=latency)
    found = improved(problem, local_search(problem, starts=1))
    assert problem.fits(found)
    reached = objective(problem, found)
    for choice in fitting(problem):
        if (choice != found).sum() <= 2:
            assert objective(problem, choice) >= reached - 1e-9


def test_the_search_alone_comes_near_at_the_size_of_a_model():
    """Of 84 units and 3 options HiGHS proves nothing in a moment; no less is found than by the costs alone."""
    problem = random_problem(5, units=84, options=3, density=0.1)
    solved = solve_quadratic(problem, QuadraticOptions(time_limit=0.0, starts=2))
    assert solved.bound == -np.inf
    assert problem.fits(solved.choice)
    assert solved.objective < problem.objective(integer_program(problem))


def test_the_field_is_what_an_option_adds():
    problem = random_problem(2)
    rng = np.random.default_rng(0)
    choice = rng.integers(0, 3, 5)
    field = problem.interactions.field(choice)
    for unit, option in itertools.product(range(5), range(3)):
        changed = choice.copy()
        changed[unit] = option
        difference = problem.interactions.of(changed) - problem.interactions.of(choice)
        assert field[unit, option] - field[unit, choice[unit]] == pytest.approx(difference, abs=1e-12)


def matrix_of(problem) -> np.ndarray:
    units, options = problem.cost.shape
    G = np.zeros((units, options, units, options))
    for unit, option in itertools.product(range(units), range(options)):
        G[unit, option, unit, option] = 2 * problem.cost[unit, option]
    for (a, b), term in zip(problem.interactions.pairs, problem.interactions.terms, strict=True):
        G[a, :, b, :], G[b, :, a, :] = term, term.T
    return G.reshape(units * options, -1)


def test_a_convex_objective_stays_as_it_is():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(8, 8))
    G = (factor @ factor.T).reshape(4, 2, 4, 2)
    pairs = np.array([*itertools.combinations(range(4), 2)])
    for unit in range(4):  # options of one unit are in no pair
        G[unit, 0, unit, 1] = G[unit, 1, unit, 0] = 0.0
    G += 20.0 * np.eye(8).reshape(4, 2, 4, 2)  # convex again
    cost = np.array([[G[unit, option, unit, option] / 2 for option in range(2)] for unit in range(4)])
    terms = np.array([G[a, :, b, :] for a, b in pairs])
    size = np.array([[2, 4]] * 4)
    problem = Problem(cost=cost, size=size, budget=12, interactions=Interactions(pairs=pairs, terms=terms))
    projected = psd_projected(problem)
    np.testing.assert_allclose(projected.cost, cost, atol=1e-9)
    np.testing.assert_allclose(projected.interactions.terms, terms, atol=1e-9)


def test_the_projection_takes_negative_eigenvalues():
    problem = random_problem(4, units=4, options=2, density=0.6)
    values, vectors = np.linalg.eigh(matrix_of(problem))
    assert values[0] < -1e-3
    expected = sum(max(value, 0) * np.outer(v, v) for value, v in zip(values, vectors.T, strict=True))
    projected = psd_projected(problem)
    found = matrix_of(projected)
    np.testing.assert_allclose(found, found.T)
    apart = np.kron(1 - np.eye(4), np.ones((2, 2))) + np.eye(8)  # but for options of one unit
    np.testing.assert_allclose(found * apart, expected * apart, atol=1e-9)
    assert problem.fits(quadratic(problem, QuadraticOptions(psd=True)))


def test_interactions_of_scores():
    scores = Scores(
        metric="given",
        values={"block_0": 1.0, "block_1": 2.0, "block_2": 3.0},
        model="m",
        shapes={},
        other_weights=0,
        interactions={
            "block_0": {"block_1": {"int2-g128": {"int2-g128": 0.5, "int4-g128": 0.25, "int8-g128": 9.0}}},
            "block_1": {"block_2": {"int8-g128": {"int8-g128": 1.0}}},
        },
    )
    options = [QuantSpec(bits=2), QuantSpec(bits=4)]
    found = interactions_of(scores, ["block_2", "block_1", "block_0"], options)
    np.testing.assert_array_equal(found.pairs, [[2, 1]])
    np.testing.assert_array_equal(found.terms, [[[0.5, 0.25], [0, 0]]])
    assert interactions_of(scores, ["block_0", "block_2"], options) is None
    assert interactions_of(dataclasses.replace(scores, interactions={}), ["block_0"], options) is None


# The first matrix has three quarters of the weights of its block.
THREE_QUARTERS = {
    "block_0/mlp/up_proj": (128, 192),
    "block_0/mlp/down_proj": (128, 64),
    "block_1/mlp/up_proj": (128, 64),
}


def test_of_a_unit_that_is_pinned_in_part_the_rest_loses_its_share():
    """Whole, block_0 loses 4 in two bits; what a pin on three quarters of it leaves loses 1, less than block_1."""
    costs = {"block_0": {"int2-g128": 4.0, "int4-g128": 0.0}, "block_1": {"int2-g128": 1.5, "int4-g128": 0.0}}
    scores = Scores(
        metric="given",
        values={"block_0": 4.0, "block_1": 1.5},
        model="m",
        shapes=THREE_QUARTERS,
        other_weights=0,
        costs=costs,
        interactions={"block_0": {"block_1": {"int2-g128": {"int2-g128": 0.8}}}},
    )
    given = {"bits": (2, 4), "pins": [Pin(pattern="block_0/mlp/up_proj", bits=2)]}
    # By place every weight of block_0 loses twice what one of block_1 does, and as many are left.
    for kind, expected in (("measured", [2, 2, 4]), ("value", [2, 2, 4]), ("place", [2, 4, 2])):
        found = allocate(scores, bpw=2.6, method="knapsack", costs=kind, **given)
        assert [found.specs[path].bits for path in found.shapes] == expected
    # In two bits block_1 stands beside all of block_0, what is pinned and what is left.
    for bpw, expected in ((2.6, 4.0 / 4), (2.2, 4.0 / 4 + 1.5 + 0.8)):
        found = allocate(scores, bpw=bpw, method="quadratic", **given)
        assert found.provenance["objective"] == pytest.approx(expected)
    # Beside what is decided as a whole, the rest of a pair loses its share as well.
    pins = [*given["pins"], Pin(pattern="block_1", bits=2)]
    found = allocate(scores, bpw=2.2, bits=(2, 4), method="quadratic", pins=pins)
    assert found.provenance["objective"] == pytest.approx((4.0 + 0.8) / 4)


def test_what_is_pinned_still_counts_beside_the_others():
    """Alone block_1 loses more in two bits than block_2, but beside block_0 in two bits it is block_2."""
    costs = {"int2-g128": 1.0, "int4-g128": 0.0}
    values = {f"block_{i}": 1.0 for i in range(3)}
    scores = Scores(
        metric="given",
        values=values,
        model="m",
        shapes={f"block_{i}/mlp/up_proj": (128, 64) for i in range(3)},
        other_weights=0,
        costs={"block_0": costs, "block_1": {**costs, "int2-g128": 1.5}, "block_2": costs},
        interactions={
            "block_0": {"block_2": {"int2-g128": {"int2-g128": 2.0, "int4-g128": 0.5}}},
            "block_1": {"block_2": {"int2-g128": {"int2-g128": 0.25}}},
        },
    )
    given = {"bits": (2, 4), "method": "quadratic", "bpw": 2.9}
    pinned = allocate(scores, pins=[Pin(pattern="block_0", bits=2)], **given)
    assert [pinned.specs[path].bits for path in pinned.shapes] == [2, 2, 4]
    assert pinned.provenance["objective"] == pytest.approx(1.5 + 0.5)
    assert pinned.provenance["bound"] == pytest.approx(1.5 + 0.5)
    other = allocate(scores, pins=[Pin(pattern="block_0", bits=3)], **{**given, "bpw": 3.2})
    assert [other.specs[path].bits for path in other.shapes] == [3, 4, 2], "beside three bits nothing is known"
    unproved = allocate(scores, options={"time_limit": 0}, **given)
    assert unproved.provenance["bound"] is None
    assert unproved.provenance["objective"] == pytest.approx(1.5 + 1.0 + 0.25)  # block_0 in four bits


@pytest.mark.parametrize(
    ("pins", "beside"),
    [({}, 0.0), ({"up": 2}, 0.75), ({"up": 2, "down": 2}, 1.0), ({"up": 2, "down": 4}, 0.75), ({"up": 16}, 0.0)],
)
def test_a_unit_counts_beside_others_by_the_share_that_is_decided(pins, beside):
    scores = Scores(
        metric="given",
        values={"block_0": 1.0, "block_1": 1.0},
        model="m",
        shapes=THREE_QUARTERS,
        other_weights=0,
        interactions={"block_0": {"block_1": {"int2-g128": {"int2-g128": 0.8, "int4-g128": -0.4}}}},
    )
    fixed = {f"block_0/mlp/{name}_proj": None if b == 16 else QuantSpec(bits=b) for name, b in pins.items()}
    found = costs_beside(scores, ["block_1"], [QuantSpec(bits=2), QuantSpec(bits=4)], fixed)
    np.testing.assert_allclose(found, [[0.8 * beside, -0.4 * beside]], rtol=1e-12)


@pytest.mark.parametrize(
    ("pairs", "terms"),
    [
        (np.array([[0, 0]]), np.zeros((1, 2, 2))),
        (np.array([[0, 1], [1, 0]]), np.zeros((2, 2, 2))),
        (np.array([[0, 1]]), np.zeros((2, 2, 2))),
        (np.array([[0.0, 1.0]]), np.zeros((1, 2, 2))),
        (np.array([[0, 1]]), np.full((1, 2, 2), np.nan)),
    ],
)
def test_what_are_no_pairs(pairs, terms):
    with pytest.raises(ValueError, match=r"pair|term"):
        Interactions(pairs=pairs, terms=terms)


def test_pairs_of_other_units_are_no_part_of_a_problem():
    for pairs, options in ((np.array([[0, 7]]), 2), (np.array([[0, 1]]), 3)):
        interactions = Interactions(pairs=pairs, terms=np.zeros((1, options, options)))
        with pytest.raises(ValueError, match="pairs of other units or options"):
            Problem(cost=np.zeros((2, 2)), size=np.ones((2, 2), int), budget=9, interactions=interactions)


@pytest.mark.parametrize(
    ("given_", "line"),
    [({"time_limit": -1.0}, "time_limit: -1.0; write seconds"), ({"starts": 0}, "starts: 0, seed: 0; write 1 or more")],
)
def test_options_that_cannot_be(given_, line):
    with pytest.raises(UserError) as refused:
        QuadraticOptions(**given_)
    assert str(refused.value).startswith(line)
