"""A limit on latencies beside the budget: enumeration, what cannot be met, and the file the latencies come from."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import llama_config

from lq.allocation import allocate
from lq.allocation import knapsack as knapsack_module
from lq.allocation.knapsack import knapsack
from lq.allocation.latency import LatencyLimit, limit_of, read_latency, settled
from lq.allocation.milp import integer_program, quickest
from lq.allocation.problem import Problem
from lq.errors import UserError
from lq.importance import Scores
from lq.models.matrices import model_shapes
from lq.numerics.spec import QuantSpec

pytestmark = pytest.mark.once

EXACT = {"knapsack": knapsack, "milp": integer_program}
exact = pytest.mark.parametrize("solve", EXACT.values(), ids=EXACT)


def choices(problem: Problem):
    units, options = problem.cost.shape
    return (np.array(choice) for choice in itertools.product(range(options), repeat=units))


@st.composite
def problems(draw) -> Problem:
    """Latencies in no relation to sizes. The budget and the limit are those of one choice at least."""
    units, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cells = units * options
    table = lambda values: np.array(draw(st.lists(values, min_size=cells, max_size=cells))).reshape(units, options)  # noqa: E731
    cost = table(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0]))
    size, latency = table(st.integers(1, 30)), table(st.integers(0, 30))
    one = np.array(draw(st.lists(st.integers(0, options - 1), min_size=units, max_size=units)))
    budget = int(size[np.arange(units), one].sum()) + draw(st.integers(0, 10))
    limit = int(latency[np.arange(units), one].sum()) + draw(st.integers(0, 10))
    return Problem(cost=cost, size=size, budget=budget, latency=latency, limit=limit)


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_small_problems_are_solved_as_by_enumeration(problem):
    best = min(problem.total_cost(choice) for choice in choices(problem) if problem.fits(choice))
    for name, solve in EXACT.items():
        choice = solve(problem)
        assert problem.fits(choice), name
        assert problem.total_cost(choice) == pytest.approx(best, abs=1e-9), name
    assert problem.fits(settled(problem, problem.smallest()))


@settings(max_examples=100, deadline=None)
@given(problem=problems(), less=st.integers(1, 60))
def test_both_or_neither(problem, less):
    """Where no choice meets the limit within the budget, the least that does is said; where one does, it is found."""
    least = min(
        problem.total_latency(choice) for choice in choices(problem) if problem.total_size(choice) <= problem.budget
    )
    limit = problem.limit - less
    if limit >= least:
        assert problem.total_latency(quickest(dataclasses.replace(problem, limit=limit))) == least
        return
    for solve in (knapsack, integer_program, lambda it: settled(it, it.smallest())):
        with pytest.raises(UserError, match=r"^latency: .* s cannot be met within \d+ bits; .* to .* s can$"):
            solve(dataclasses.replace(problem, limit=limit))


@exact
def test_the_limit_bought_by_other_bits(solve):
    """Three bits are slower than four: within 7 bits and 9 ns, the one that loses more gets four."""
    cost, size = np.array([[4.0, 1.0, 0.0], [2.0, 0.5, 0.0]]), np.array([[2, 3, 4]] * 2)
    latency = np.array([[3, 6, 5]] * 2)
    problem = Problem(cost=cost, size=size, budget=7, latency=latency, limit=9)
    np.testing.assert_array_equal(solve(problem), [2, 0])
    np.testing.assert_array_equal(solve(dataclasses.replace(problem, limit=11)), [2, 1])
    np.testing.assert_array_equal(solve(dataclasses.replace(problem, latency=None)), [2, 1])


@exact
def test_a_larger_limit_never_costs_more(solve):
    rng = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 8])
    cost = rng.lognormal(0, 1.5, (28, 1)) * 4.0**-bits
    size, latency = 100 * np.tile(bits, (28, 1)), np.tile([90, 140, 110, 200], (28, 1)) + rng.integers(0, 9, (28, 4))
    ends = [int(latency.min(1).sum()), int(latency.max(1).sum())]
    costs = []
    for limit in np.linspace(*ends, 8).astype(int):
        problem = Problem(cost=cost, size=size, budget=28 * 380, latency=latency, limit=int(limit))
        choice = solve(problem)
        assert problem.fits(choice)
        costs.append(problem.total_cost(choice))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(problem.total_cost(knapsack(dataclasses.replace(problem, latency=None))))


def test_exact_solvers_agree_at_the_size_of_a_model():
    rng = np.random.default_rng(1)
    weights = np.array(([16] * 4 + [43] * 3) * 8)
    bits = np.array([2, 3, 4, 6])
    cost = rng.lognormal(0, 1.5, (56, 1)) * weights[:, None] * 4.0**-bits
    size, latency = weights[:, None] * bits, weights[:, None] * np.array([3, 7, 5, 8]) + rng.integers(0, 5, (56, 4))
    limit = int(latency.min(1).sum() + 0.3 * (latency[:, 2].sum() - latency.min(1).sum()))
    problem = Problem(cost=cost, size=size, budget=int(3.2 * weights.sum()), latency=latency, limit=limit)
    found = {name: problem.total_cost(solve(problem)) for name, solve in EXACT.items()}
    assert found["knapsack"] == pytest.approx(found["milp"], rel=1e-9)
    assert found["milp"] > problem.total_cost(knapsack(dataclasses.replace(problem, latency=None))), "the limit binds"


def test_too_many_states_are_refused(monkeypatch):
    monkeypatch.setattr(knapsack_module, "MOST_STATES", 0)
    rng = np.random.default_rng(0)
    size, latency = rng.integers(1, 1000, (2, 6, 4))
    half = {"budget": int(size.mean(1).sum()), "limit": int(latency.mean(1).sum())}
    problem = Problem(cost=rng.uniform(size=(6, 4)), size=size, latency=latency, **half)
    with pytest.raises(UserError, match=r"^knapsack: more than 0 states of size and latency; write milp, or greedy"):
        knapsack(problem)


def test_a_limit_below_all_says_the_range():
    latency = np.array([[1_500_000_000, 2_000_000_000]] * 2)
    with pytest.raises(UserError) as refused:
        Problem(cost=np.zeros((2, 2)), size=np.ones((2, 2), int), budget=4, latency=latency, limit=10**9)
    assert str(refused.value) == "latency: 1 s cannot be met within 4 bits; 3 to 4 s can"


TABLE = {"block_0/mlp/up_proj": {"int2": 1e-5, "int4": 2e-5}, "block_0/mlp/down_proj": {"int2": 3e-9, "int4": 1.5e-9}}


def test_latencies_are_read_in_nanoseconds(tmp_path):
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(TABLE))
    units = {"block_0": list(TABLE), "block_0/mlp/up_proj": ["block_0/mlp/up_proj"], "none": []}
    found = read_latency(file, units, ["int2", "int4"])
    # 1.5 ns are rounded up, each matrix for itself.
    np.testing.assert_array_equal(found, [[10_003, 20_002], [10_000, 20_000], [0, 0]])
    assert limit_of(2.00015e-5) == 20_001
    assert limit_of(1e-5) == 10_000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "not a latency table; write matrix path -> option -> seconds"),
        ("{", "not a latency table (Expecting"),
        ('{"block_0/mlp/up_proj": 3}', "not a latency table; write"),
        ('{"block_0/mlp/up_proj": {"int4": 1}}', "no int2 of block_0/mlp/up_proj; measure it, or leave the option out"),
        ('{"block_0/mlp/up_proj": {"int2": -1}}', "int2 of block_0/mlp/up_proj: -1 is no time in seconds"),
        ('{"block_0/mlp/up_proj": {"int2": NaN}}', "int2 of block_0/mlp/up_proj: nan is no time in seconds"),
        ('{"block_0/mlp/up_proj": {"int2": "1"}}', "int2 of block_0/mlp/up_proj: '1' is no time in seconds"),
    ],
)
def test_files_that_are_none(tmp_path, text, line):
    file = tmp_path / "latency.json"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        read_latency(file, {"block_0": ["block_0/mlp/up_proj"]}, ["int2"])
    assert str(refused.value).startswith(f"{file}: {line}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "1"])
def test_limits_that_are_none(seconds):
    with pytest.raises(UserError, match=r"^latency: .* seconds; write a number such as 0\.02, from 1e-9 to 3600$"):
        limit_of(seconds)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such latency table; write one"):
        read_latency(tmp_path / "none.json", {}, [])


def test_a_plan_within_a_limit(tmp_path):
    """Four bits take twice as long as two: half of the blocks can have them, the most important ones."""
    config = llama_config(4)
    shapes = model_shapes(config)
    values = {f"block_{i}": float(value) for i, value in enumerate([1, 4, 2, 3])}
    scores = Scores(metric="given", values=values, model="m", shapes=shapes, other_weights=0)
    table = {path: {"int2-g32": 1e-6, "int4-g32": 2e-6} for path in shapes}
    (tmp_path / "times.json").write_text(json.dumps(table))
    given = {"bpw": 4.625, "bits": (2, 4), "spec": QuantSpec(bits=4, group_size=32), "method": "knapsack"}
    free, matrices = allocate(scores, **given), len(shapes) - 1
    assert free.bits_per_block() == (4, 4, 4, 4)
    limit = LatencyLimit(table=tmp_path / "times.json", seconds=1.5e-6 * matrices)
    plan = allocate(scores, **given, latency=limit)
    assert plan.bits_per_block() == (2, 4, 2, 4)
    assert plan.provenance["seconds"] == pytest.approx(1.5e-6 * matrices, rel=1e-12)
    with pytest.raises(UserError, match=r"^latency: 0\.00001 s cannot be met within"):
        allocate(scores, **given, latency=dataclasses.replace(limit, seconds=1e-5))
    del table["block_0/mlp/up_proj"]["int4-g32"]
    (tmp_path / "times.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="no int4-g32 of block_0/mlp/up_proj; measure it"):
        allocate(scores, **given, latency=limit)
    with pytest.raises(UserError, match="latency: 0 seconds; write a number such as"):
        LatencyLimit(table=tmp_path / "times.json", seconds=0)
