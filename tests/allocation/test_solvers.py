"""Every solver against enumeration, against each other, and on published sensitivities."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.allocation.knapsack import knapsack
from lq.allocation.milp import integer_program
from lq.allocation.problem import MOST_COST, Problem
from lq.allocation.relaxation import greedy, lagrangian, relax
from lq.errors import UserError
from lq.importance.controls import use_more_bits

pytestmark = pytest.mark.once

FIXTURE = json.loads((Path(__file__).parent.parent / "fixtures" / "allocation" / "sensitivities.json").read_text())
EXACT = {"knapsack": knapsack, "milp": integer_program}
ALL = {"greedy": greedy, "lagrangian": lagrangian, **EXACT}
exact = pytest.mark.parametrize("solve", EXACT.values(), ids=EXACT)
every = pytest.mark.parametrize("solve", ALL.values(), ids=ALL)


def enumerated(problem: Problem) -> float:
    """The least cost within the budget, by trying every choice."""
    units, options = problem.cost.shape
    choices = (np.array(choice) for choice in itertools.product(range(options), repeat=units))
    return min(problem.total_cost(c) for c in choices if problem.total_size(c) <= problem.budget)


@st.composite
def problems(draw) -> Problem:
    """A few units and options, sizes of no order, ties, options that a unit lacks."""
    units, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cells = units * options
    cost = np.array(draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0]), min_size=cells, max_size=cells)))
    size = np.array(draw(st.lists(st.integers(1, 30), min_size=cells, max_size=cells))).reshape(units, options)
    cost = cost.reshape(units, options)
    if options > 1 and draw(st.booleans()):
        cost[draw(st.integers(0, units - 1)), draw(st.integers(0, options - 1))] = np.inf
    least = np.where(np.isfinite(cost), size, 99).min(1).sum()
    return Problem(cost=cost, size=size, budget=draw(st.integers(int(least), int(size.max(1).sum()) + 1)))


@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_small_problems_are_solved_as_by_enumeration(problem):
    best = enumerated(problem)
    assert relax(problem).bound <= best + 1e-9
    for name, solve in ALL.items():
        choice = solve(problem)
        assert problem.total_size(choice) <= problem.budget, name
        assert problem.total_cost(choice) >= best - 1e-9, name
        if name in EXACT:
            assert problem.total_cost(choice) == pytest.approx(best, abs=1e-9), name


def convex_problem(seed: int, units=224, mean=3.0) -> Problem:
    """Of the shapes of Llama-2-7B, a loss that falls with about 4^-bits, groups of 128 with scales and zero points."""
    rng = np.random.default_rng(seed)
    weights = np.array(([4096 * 4096] * 4 + [4096 * 11008] * 3) * (units // 7))
    bits = np.array([2, 3, 4, 5, 6, 8])
    noise = np.exp(0.2 * rng.standard_normal((units, 6)))
    cost = rng.lognormal(0, 1.5, (units, 1)) * weights[:, None] / 1e6 * 4.0**-bits * noise
    size = weights[:, None] * bits + weights[:, None] // 128 * (16 + bits)
    return Problem(cost=cost, size=size, budget=int(mean * weights.sum()))


@pytest.mark.parametrize("mean", [2.25, 3.0, 4.0])
def test_exact_solvers_agree_at_the_size_of_a_model(mean):
    """Programs of nothing in common: states cut off by a bound, and HiGHS. The heuristics come within 1 %."""
    problem = convex_problem(0, mean=mean)
    costs = {name: problem.total_cost(solve(problem)) for name, solve in ALL.items()}
    assert costs["knapsack"] == pytest.approx(costs["milp"], rel=1e-9)
    for name in ("greedy", "lagrangian"):
        assert costs["knapsack"] <= costs[name] * (1 + 1e-12)
        assert costs[name] <= costs["knapsack"] * 1.01


@pytest.mark.parametrize(
    ("share", "residual"), [(0.125, 13034), (0.25, 10109), (0.5, 5736), (0.75, 2218)], ids=["2.25", "2.5", "3", "3.5"]
)
@exact
def test_measured_sensitivities_of_llama_2_7b(solve, share, residual):
    """Two or four bits for each of 224 matrices, by how much each alone hurts at two: residuals that others found."""
    cost, units = llama_2_7b()
    size = units[:, None] * np.array([0, 1])
    choice = solve(Problem(cost=cost, size=size, budget=int(share * 6176)))
    assert cost[np.arange(224), choice].sum() == residual


@pytest.mark.parametrize(("share", "residual"), [(0.25, 13863), (0.5, 8361), (0.75, 3788)])
@exact
def test_whole_blocks_leave_more(solve, share, residual):
    cost, units = llama_2_7b()
    blocks, size = cost.reshape(32, 7, 2).sum(1), units.reshape(32, 7).sum(1)[:, None] * np.array([0, 1])
    choice = solve(Problem(cost=blocks, size=size, budget=int(share * 6176)))
    assert blocks[np.arange(32), choice].sum() == residual


def test_the_recipe_of_practice_leaves_a_fifth_more_than_the_optimum():
    """v_proj and down_proj in the blocks of `use_more_bits` at four bits, the rest at two: 2.306 bits in the mean."""
    cost, units = llama_2_7b()
    blocks = [use_more_bits(block, 32) for block in range(32)]
    high = (np.array(blocks)[:, None] & np.isin(FIXTURE["llama2_7b"]["order"], ["v_proj", "down_proj"])).reshape(-1)
    taken = int(units[high].sum())
    assert 2 + 2 * taken / 6176 == pytest.approx(2.306, abs=5e-4)
    assert cost[~high, 0].sum() == 14836
    best = knapsack(Problem(cost=cost, size=units[:, None] * np.array([0, 1]), budget=taken))
    assert cost[np.arange(224), best].sum() == 12310


def llama_2_7b() -> tuple[np.ndarray, np.ndarray]:
    """Cost [224, 2] at 2 and 4 bits, and sizes in units of 4096 * 256 weights, of two bits more."""
    sensitivity = np.array(FIXTURE["llama2_7b"]["sensitivity"], float).reshape(-1)
    return np.stack([sensitivity, np.zeros(224)], axis=1), np.array([16, 16, 16, 16, 43, 43, 43] * 32)


@pytest.mark.parametrize(
    ("share", "residual", "low"),
    [
        (0.10, 0.206386, {10, 12, 13, 14, 15, 16, 17, 18}),
        (0.25, 0.114042, {14, 15, 16, 17, 18}),
        (0.50, 0.070248, {15, 17, 18}),
        (0.75, 0.029183, {13, 18}),
        (0.90, 0.012655, {18}),
    ],
)
@exact
def test_hessian_traces_of_resnet_18(solve, share, residual, low):
    """Which layers stay at 4 bits where a share of the way to 8 is given, three pairs of them at one width."""
    data = {name: np.array(values) for name, values in FIXTURE["resnet18"].items()}
    cost = data["trace"][:, None] * np.stack([data["error_4_bit"] - data["error_8_bit"], np.zeros(19)], axis=1)
    size = data["parameters"][:, None] * np.array([4, 8])
    tied = {6: 4, 11: 9, 16: 14}
    units = [[k, *(other for other, first in tied.items() if first == k)] for k in range(19) if k not in tied]
    together = [np.array([table[unit].sum(0) for unit in units]) for table in (cost, size)]
    choice = solve(Problem(cost=together[0], size=together[1], budget=int(size[:, 0].sum() * (1 + share))))
    assert {k for unit, option in zip(units, choice, strict=True) for k in unit if option == 0} == low
    assert together[0][np.arange(16), choice].sum() == pytest.approx(residual, abs=1e-6)


@every
def test_a_step_that_pays_only_as_a_whole_is_taken(solve):
    """Three bits gain nothing, four all."""
    problem = Problem(cost=np.array([[1.0, 1.0, 0.0], [0.4, 0.4, 0.3]]), size=np.array([[2, 3, 4]] * 2), budget=6)
    np.testing.assert_array_equal(solve(problem), [2, 0])


@exact
def test_what_little_the_last_bit_saves_is_saved(solve):
    """A unit of a cost of ten million beside ones whose last step saves one: HiGHS alone calls that equal."""
    cost = np.array([[1e7, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    problem = Problem(cost=cost, size=np.array([[2, 4]] * 4), budget=14)
    np.testing.assert_array_equal(solve(problem), [1, 0, 1, 1])


@every
def test_no_gain_no_bits(solve):
    problem = Problem(cost=np.zeros((3, 2)), size=np.array([[2, 4]] * 3), budget=12)
    np.testing.assert_array_equal(solve(problem), [0, 0, 0])


@every
def test_a_larger_budget_never_costs_more(solve):
    """Strictly true of the exact ones; of the others here, where steps are of two sizes."""
    costs = []
    for mean in np.linspace(2.2, 8.2, 13):
        problem = convex_problem(1, units=28, mean=mean)
        costs.append(problem.total_cost(solve(problem)))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(costs))


def test_a_budget_below_all_is_refused():
    with pytest.raises(UserError, match=r"^budget: 3 bits cannot be met; the least is 4$"):
        Problem(cost=np.zeros((2, 2)), size=np.array([[2, 4]] * 2), budget=3)


@pytest.mark.parametrize("largest", [1.7e308, -1e308, 1.1e200])
def test_costs_too_large_to_be_added_up_are_refused(largest):
    with pytest.raises(UserError, match=r"^costs: as large as 1\S+, where the most is 1e\+200; score again, or write"):
        Problem(cost=np.array([[largest, 0.0], [1.0, np.inf]]), size=np.array([[2, 4]] * 2), budget=6)


@every
def test_the_largest_costs_are_solved(solve):
    """Ten units, the first worth least."""
    cost = np.linspace(0.1, 1.0, 10)[:, None] * np.array([MOST_COST, MOST_COST / 4])
    problem = Problem(cost=cost, size=np.full((10, 2), 10**9) * np.array([2, 4]), budget=22 * 10**9)
    np.testing.assert_array_equal(solve(problem), [0] * 9 + [1])


@pytest.mark.parametrize(
    ("cost", "size"),
    [
        (np.full((1, 2), np.nan), np.ones((1, 2), int)),
        (np.full((1, 2), np.inf), np.ones((1, 2), int)),
        (np.zeros((1, 2)), np.ones((1, 2))),
        (np.zeros((1, 2)), np.ones((2, 2), int)),
    ],
)
def test_what_is_no_problem(cost, size):
    with pytest.raises(ValueError, match="cost"):
        Problem(cost=cost, size=size, budget=9)
