"""Shapley values by permutations: games with known answers, the published numbers, efficiency on a model."""

import dataclasses
import itertools

import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.allocation import allocate
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import METRICS, Scores, score
from lq.importance.shapley import (
    ShapleyOptions,
    antithetic_orders,
    conditional,
    covariance,
    mean_and_error,
    pair_terms,
    quadratic_terms,
)
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe

pytestmark = pytest.mark.once

ALL = ShapleyOptions(significance=0.0)


def played(loss, orders) -> np.ndarray:
    """What every unit adds at its turn; `loss` of the set of low units."""
    found = np.zeros((len(orders), len(orders[0])))
    for row, order in zip(found, orders, strict=True):
        for turn, unit in enumerate(order):
            row[unit] = loss(set(order[: turn + 1])) - loss(set(order[:turn]))
    return found


def every_order(units):
    return [np.array(order) for order in itertools.permutations(range(units))]


def game(units, seed=0):
    """Costs, symmetric interactions, and the loss of a set."""
    rng = np.random.default_rng(seed)
    c, w = rng.uniform(1, 3, units), np.triu(rng.normal(0, 1, (units, units)), 1)
    w = w + w.T
    return c, w, lambda low: sum(c[i] for i in low) + sum(w[i, j] for i in low for j in low if i < j)


def test_orders_come_with_their_reverse():
    orders = antithetic_orders(7, 10, np.random.default_rng(0))
    assert len(orders) == 10
    for one, other in zip(orders[::2], orders[1::2], strict=True):
        np.testing.assert_array_equal(one, other[::-1])
        assert sorted(one) == list(range(7))


def test_an_additive_game_has_no_interactions():
    c = np.array([1.0, 2.0, 3.5])
    orders = antithetic_orders(3, 8, np.random.default_rng(0))
    marginals = played(lambda low: sum(c[i] for i in low), orders)
    for kind in ("covariance", "conditional"):
        cost, pairs = pair_terms(marginals, orders, dataclasses.replace(ALL, interactions=kind))
        np.testing.assert_allclose(cost, c, atol=1e-12)
        np.testing.assert_allclose(pairs, 0, atol=1e-12)


def test_a_game_of_pairs_is_recovered_over_all_orders():
    c, w, loss = game(4)
    orders = every_order(4)
    marginals = played(loss, orders)
    phi, _ = mean_and_error(marginals)
    np.testing.assert_allclose(phi, c + w.sum(1) / 2, atol=1e-12)
    # Sum by sum, not on average: the efficiency of the Shapley value.
    np.testing.assert_allclose(marginals.sum(1), loss({0, 1, 2, 3}), atol=1e-12)
    cost, pairs = pair_terms(marginals, orders, dataclasses.replace(ALL, interactions="conditional"))
    np.testing.assert_allclose(pairs, w, atol=1e-12)
    np.testing.assert_allclose(cost, c, atol=1e-12)


def test_pairs_are_recovered_from_some_orders_within_their_errors():
    _, w, loss = game(6)
    orders = antithetic_orders(6, 400, np.random.default_rng(1))
    found, error = conditional(played(loss, orders), orders)
    outside = ~np.eye(6, dtype=bool)
    # 15 pairs: beyond four standard errors in one of a thousand such tests.
    assert (np.abs(found - w)[outside] <= 4 * error[outside]).all()
    assert error[outside].max() < 0.5


@pytest.mark.parametrize("w", [1.0, -1.0])
def test_covariance_does_not_know_the_sign_of_an_interaction(w):
    """Of two units that lose w together: one of them is charged with it, never both."""
    orders = every_order(2)
    marginals = played(lambda low: 3.0 * len(low) + w * (len(low) == 2), orders)
    # Over both orders once each, the unbiased covariance is twice the -w^2 / 4 of the distribution.
    np.testing.assert_allclose(covariance(marginals), [[0.5, -0.5], [-0.5, 0.5]], atol=1e-12)
    np.testing.assert_allclose(conditional(marginals, orders)[0], [[0, w], [w, 0]], atol=1e-12)


def test_published_terms():
    """K = C / 2 + diag C / 2, a = phi - K off the diagonal; objectives by hand."""
    phi, C = np.array([1.0, 2.0, 3.0]), np.array([[0.2, 0.1, 0], [0.1, 0.3, -0.1], [0, -0.1, 0.4]])
    cost, pairs = quadratic_terms(phi, C, 0.5)
    np.testing.assert_allclose(cost, [0.95 + 0.2, 2 + 0.3, 3.05 + 0.4], atol=1e-12)
    np.testing.assert_allclose(pairs, [[0, 0.1, 0], [0.1, 0, -0.1], [0, -0.1, 0]], atol=1e-12)
    for q, expected in (([1, 1, 0], 3.55), ([1, 0, 1], 4.6), ([1, 1, 1], 6.9)):
        low = np.flatnonzero(q)
        total = sum(cost[low]) + sum(pairs[i, j] for i, j in itertools.combinations(low, 2))
        assert total == pytest.approx(expected, abs=1e-12)
    assert phi.sum() + np.trace(C) == pytest.approx(6.9)


def test_orders_that_ended_early_are_left_out_of_means():
    marginals = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan], [5.0, 6.0, 1.0], [7.0, 8.0, 2.0]])
    phi, error = mean_and_error(marginals)
    np.testing.assert_allclose(phi, [4.0, 16 / 3, 1.5])
    np.testing.assert_allclose(error[0], np.std([1, 3, 5, 7], ddof=1) / 2)
    C = covariance(marginals)
    np.testing.assert_allclose(C[2, 2], 0.5)
    np.testing.assert_allclose(C, C.T)


def test_pairs_within_the_noise_are_left_out():
    _, _, loss = game(5)
    orders = antithetic_orders(5, 20, np.random.default_rng(0))
    marginals = played(loss, orders)
    for kind in ("covariance", "conditional"):
        options = [ShapleyOptions(interactions=kind, significance=s) for s in (0.0, 2.0, 1e9)]
        kept = [np.count_nonzero(pair_terms(marginals, orders, o)[1]) for o in options]
        assert kept[0] == 20
        assert kept[0] > kept[1] > kept[2] == 0


# On a model

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 16), np.int32), "random", "random")
FORMAT = {"bits": [4, 2], "group_size": 32, "batch_size": 2}


@pytest.fixture(scope="module")
def source():
    config = llama_config(3)
    return InMemory(config, random_params(config))


def evaluated(source, bits):
    specs = dict.fromkeys(matrices(source.config), QuantSpec(bits=bits, group_size=32))
    return evaluate(
        PlannedSource(source, specs, Recipe()),
        WINDOWS,
        reference=make_reference(source, WINDOWS, batch_size=2),
        batch_size=2,
    )


@pytest.mark.once
@pytest.mark.parametrize("value", ["kl", "nll"])
@pytest.mark.parametrize("unit", ["block", "part"])
def test_all_units_together_lose_what_the_low_model_loses_more(source, unit, value):
    found = score(source, "shapley", WINDOWS, {**FORMAT, "unit": unit, "orders": 2, "value": value})
    low, high = (getattr(evaluated(source, bits), value) for bits in (2, 4))
    # The same arithmetic, but for products with packed weights that sum in another order: 2^-24 of a likelihood of 8
    # for each of a few blocks, and of a KL as much of what it is subtracted from.
    assert sum(found.values.values()) == pytest.approx(low - high, rel=1e-4, abs=1e-7 if value == "kl" else 5e-6)
    count = 3 if unit == "block" else 6
    assert len(found.values) == count
    # The reference, the start, and twice the blocks from each unit's on.
    assert found.passes == pytest.approx(2 + 2 * (count // 3) * (1 + 2 / 3 + 1 / 3))
    assert found.extra["truncated"] == 0


@pytest.mark.once
def test_damaged_models_end_an_order(source):
    found = score(source, "shapley", WINDOWS, {**FORMAT, "orders": 8, "truncate": 1.0001, "seed": 1})
    whole = score(source, "shapley", WINDOWS, {**FORMAT, "orders": 8, "seed": 1})
    assert found.extra["truncated"] > 0
    assert found.passes < whole.passes
    with pytest.raises(UserError, match=r"^truncate: .*; no order of 2 lasted until block_\S+; write more orders"):
        score(source, "shapley", WINDOWS, {**FORMAT, "unit": "part", "orders": 2, "truncate": 1.0 + 1e-9})


@pytest.mark.once
def test_plans_are_made_with_interactions(source, tmp_path):
    options = {**FORMAT, "orders": 6, "significance": 0.0, "interactions": "conditional"}
    found = score(source, "shapley", WINDOWS, options)
    assert found.interactions.keys() == {"block_0", "block_1"}
    assert found.interactions["block_1"].keys() == {"block_2"}
    assert found.costs["block_0"].keys() == {"int2-g32", "int4-g32"}
    found.write(tmp_path / "s.json")
    assert Scores.read(tmp_path / "s.json") == found
    # Both low: what phi says of all three is exact.
    pairs = sum(t["int2-g32"]["int2-g32"] for others in found.interactions.values() for t in others.values())
    costs = sum(cost["int2-g32"] for cost in found.costs.values())
    assert costs + pairs == pytest.approx(sum(found.values.values()), abs=1e-9)
    plan = allocate(found, bpw=3.6, bits=(2, 4), spec=QuantSpec(bits=4, group_size=32), method="quadratic")
    assert plan.bpw <= 3.6


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": [2, 3, 4]}, "bits: [2, 3, 4], group_size: 128; write two formats, such as bits [2, 4]"),
        ({"orders": 3}, "orders: 3; write an even number from 2 up"),
        ({"shrink": 1.5}, "shrink: 1.5; write 0 to 1"),
        ({"truncate": 1.0}, "truncate: 1.0; write a factor above 1, such as 2, or null"),
        ({"significance": -1.0}, "significance: -1.0; write standard errors, such as 2"),
        ({"seed": -1}, "seed: -1; write 0 or more"),
    ],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(UserError) as refused:
        METRICS.options("shapley", options)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    "interactions",
    [
        {"block_0": {"block_9": {}}},
        {"block_0": {"block_0": {}}},
        {"block_0": {"block_1": {}}, "block_1": {"block_0": {}}},
        {"block_0": {"block_1": {"int2": {"int2": float("nan")}}}},
    ],
)
def test_interactions_that_cannot_be(interactions):
    with pytest.raises(UserError, match=r"^score given: interactions that are not of pairs of the units; score again$"):
        Scores(
            metric="given",
            values={"block_0": 1.0, "block_1": 1.0},
            model="m",
            shapes={},
            other_weights=0,
            interactions=interactions,
        )
