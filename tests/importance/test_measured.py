"""Measured KL: what the evaluation of a plan says, unit by unit; what it costs; and plans made from it."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.allocation import allocate
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import METRICS, Scores, score
from lq.importance.units import members
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 16), np.int32), "random", "random")
FORMAT = {"bits": [4, 2], "group_size": 32, "batch_size": 2}


@pytest.fixture(scope="module")
def source():
    config = llama_config(3)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.fixture(scope="module")
def kl(source):
    return score(source, "kl", WINDOWS, {**FORMAT, "unit": "part"})


def lost(source, widths) -> float:
    """By the evaluation of a quantized model: nothing of the above in it."""
    specs = {path: QuantSpec(bits=bits, group_size=32) for path, bits in widths.items()}
    reference = make_reference(source, WINDOWS, batch_size=2)
    return evaluate(PlannedSource(source, specs, Recipe()), WINDOWS, reference=reference, batch_size=2).kl


def test_a_cost_is_what_the_evaluation_says(source, kl):
    paths = list(matrices(source.config))
    assert list(kl.costs) == [f"block_{i}/{part}" for i in range(3) for part in ("attention", "mlp")]
    for unit, of_unit in kl.costs.items():
        assert list(of_unit) == ["int2-g32", "int4-g32"]
        for bits, spec in ((2, "int2-g32"), (4, "int4-g32")):
            # Dense parts are rounded to 16 bits there, in the original not: a few 1e-5.
            expected = lost(source, dict.fromkeys(members(unit, paths), bits)) - lost(source, {})
            assert of_unit[spec] == pytest.approx(expected, rel=1e-3, abs=2e-5)
        assert kl.values[unit] == of_unit["int2-g32"] - of_unit["int4-g32"]


@pytest.mark.parametrize(("others", "bits"), [("lowest", 2), ("highest", 4)])
def test_among_quantized_matrices_it_is_the_difference(source, others, bits):
    found = score(source, "kl", WINDOWS, {**FORMAT, "unit": "block", "others": others})
    base = dict.fromkeys(matrices(source.config), bits)
    other = 6 - bits
    for unit, of_unit in found.costs.items():
        assert abs(of_unit[f"int{bits}-g32"]) < 1e-9, "as it is"
        changed = base | dict.fromkeys(members(unit, base), other)
        expected = lost(source, changed) - lost(source, base)
        assert of_unit[f"int{other}-g32"] == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_what_it_took(kl):
    """The reference and the model as it is; from each block on two parts at two widths; and once on the way."""
    behind = [1.0, 2 / 3, 1 / 3]
    assert kl.passes == pytest.approx(1 + 1 + 2 * 2 * sum(behind) + 2 / 3)


@pytest.mark.parametrize("planted", [0, 2])
def test_a_block_that_writes_more_is_first(source, planted):
    params = dict(source.params())
    for index in range(3):
        factor = 10.0 if index == planted else 0.01
        block = dict(params[f"block_{index}"])
        for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
            block[part] = {**block[part], name: {"kernel": factor * block[part][name]["kernel"]}}
        params[f"block_{index}"] = block
    found = score(InMemory(source.config, params), "kl", WINDOWS, {**FORMAT, "unit": "block"})
    assert found.ranking()[0] == f"block_{planted}"


def test_plans_are_made_by_what_was_measured(source, kl):
    spec = QuantSpec(bits=4, group_size=32)
    bpw = 3.6
    plan = allocate(kl, bpw=bpw, bits=(2, 4), spec=spec, method="knapsack")
    assert plan.provenance["costs"] == "measured"
    assert plan.bpw <= bpw

    def cost(widths):
        return sum(kl.costs[unit][f"int{bits}-g32"] for unit, bits in widths.items())

    def fits(widths):
        of = {path: bits for unit, bits in widths.items() for path in members(unit, plan.shapes)}
        size = sum(QuantSpec(bits=bits, group_size=32).size_bits(plan.shapes[path]) for path, bits in of.items())
        return size <= bpw * sum(math.prod(plan.shapes[path]) for path in of)

    choices = (dict(zip(kl.values, widths, strict=True)) for widths in itertools.product((2, 4), repeat=6))
    best = min((choice for choice in choices if fits(choice)), key=cost)
    found = {unit: plan.specs[members(unit, plan.shapes)[0]].bits for unit in kl.values}
    assert cost(found) == pytest.approx(cost(best), rel=1e-12)


def test_group_sizes_are_chosen_with_widths(source):
    given = {"bits": [2, 3], "group_size": [64, 32], "batch_size": 2, "unit": "part"}
    found = score(source, "kl", WINDOWS, given)
    names = ["int2-g64", "int2-g32", "int3-g64", "int3-g32"]
    assert all(list(of_unit) == names for of_unit in found.costs.values())
    options = [QuantSpec(bits=bits, group_size=size) for bits, size in ((2, 64), (2, 32), (3, 64), (3, 32))]
    bpw = 2.9
    plan = allocate(found, bpw=bpw, bits=(2, 3), spec=QuantSpec(bits=4), group_sizes=(32, 64), method="knapsack")
    assert plan.provenance["group_sizes"] == [32, 64]
    assert plan.bpw <= bpw

    def total(table, choice):
        return sum(table[unit][option] for unit, option in zip(found.costs, choice, strict=True))

    cost = {unit: [of_unit[name] for name in names] for unit, of_unit in found.costs.items()}
    paths = {unit: members(unit, plan.shapes) for unit in cost}
    size = {unit: [sum(o.size_bits(plan.shapes[p]) for p in paths[unit]) for o in options] for unit in cost}
    budget = bpw * sum(math.prod(shape) for path, shape in plan.shapes.items() if path.startswith("block_"))
    fitting = (c for c in itertools.product(range(4), repeat=len(cost)) if total(size, c) <= budget)
    best = min(total(cost, choice) for choice in fitting)
    chosen = [options.index(plan.specs[paths[unit][0]]) for unit in cost]
    assert total(cost, chosen) == pytest.approx(best, rel=1e-12)
    assert len({plan.specs[path].group_size for path in plan.specs}) == 2, "a choice of both, or nothing was shown"


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_units(tied):
    config = dataclasses.replace(llama_config(2), tie_embeddings=tied)
    source = InMemory(config, random_params(config))  # in 16 bits, so that dense parts stay as they are
    found = score(source, "kl", WINDOWS, {**FORMAT, "unit": "block", "tables": True})
    tables = ["embed/tokens"] if tied else ["embed/tokens", "head"]
    assert list(found.costs) == ["block_0", "block_1", *tables]
    for path, bits in itertools.product(tables, (2, 4)):
        expected = lost(source, {path: bits}) - lost(source, {})
        assert found.costs[path][f"int{bits}-g32"] == pytest.approx(expected, rel=1e-4, abs=1e-7)

    spec = QuantSpec(bits=4, group_size=32)
    plan = allocate(found, bpw=3.8, bits=(2, 4), spec=spec, method="knapsack", count="all")
    assert set(plan.specs) == set(plan.shapes)
    assert plan.bpw <= 3.8
    pinned = allocate(found, bpw=3.8, bits=(2, 4), spec=spec, method="knapsack", count="all", embedding_bits=3)
    assert pinned.specs["embed/tokens"].bits == 3
    with pytest.raises(UserError, match="embed/tokens is a unit, but only blocks are counted; write count all"):
        allocate(found, bpw=3.8, bits=(2, 4), spec=spec, method="knapsack")


def test_of_one_width_a_unit_is_worth_what_it_loses(source):
    found = score(source, "kl", WINDOWS, {**FORMAT, "bits": [2], "unit": "block"})
    assert all(value == found.costs[unit]["int2-g32"] > 0 for unit, value in found.values.items())


def test_a_packed_model_is_refused(source):
    spec = QuantSpec(bits=4, group_size=32)
    packed = PlannedSource(source, dict.fromkeys(matrices(source.config), spec), Recipe())
    with pytest.raises(UserError, match="block_0 is packed already"):
        score(packed, "kl", WINDOWS, {**FORMAT, "unit": "block"})


def test_costs_survive_json(kl, tmp_path):
    kl.write(tmp_path / "kl.json")
    assert Scores.read(tmp_path / "kl.json") == kl


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"bits": (2, 3), "bpw": 3.0},
            "costs: kl measured int2-g32, int4-g32, not int3-g32; choose among those, or score again",
        ),
        ({"costs": "measured", "method": "rank"}, "costs: measured, but rank goes by the place alone; write greedy"),
    ],
)
def test_what_was_not_measured_is_refused(kl, given, line):
    with pytest.raises(UserError, match=f"^{line}"):
        allocate(kl, **{"bpw": 3.6, "spec": QuantSpec(bits=4, group_size=32), "method": "knapsack", **given})


@pytest.mark.parametrize("metric", ["kl", "shapley"])
def test_a_quantizer_that_scales_channels_is_refused_before_it_runs(source, monkeypatch, metric):
    monkeypatch.setattr("lq.importance.quantized.quantized_source", lambda *_, **__: pytest.fail("quantized"))
    with pytest.raises(
        UserError, match=r"^candidates: awq changes more than matrices, of which alone options are made"
    ):
        score(source, metric, WINDOWS, {**FORMAT, "method": "awq"})


def test_scores_without_costs(source):
    with pytest.raises(UserError, match=r"^costs: measured, but zd measures none; write place or value"):
        allocate(score(source, "zd"), bpw=3.0, method="greedy", costs="measured")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": []}, "bits: []; write each width once"),
        ({"bits": [2, 2]}, "bits: [2, 2]; write each width once"),
        ({"bits": [9]}, "bits: 9"),
        ({"method": "gtpq"}, "unknown quantizer 'gtpq'"),
        ({"options": {"clap": 1}}, "quantizer rtn: unknown option 'clap'"),
        ({"batch_size": 0}, "batch_size: 0; write 1 or more"),
    ],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(UserError) as refused:
        METRICS.options("kl", options)
    assert str(refused.value).startswith(line)
