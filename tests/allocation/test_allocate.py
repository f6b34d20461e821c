"""Plans: the budget is met to the step, never exceeded, and the order of the scores decides."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import llama_config

from lq.allocation import Plan, allocate, uniform_plan
from lq.allocation.pins import Pin
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.models.matrices import matrices, model_shapes, other_weights
from lq.numerics.spec import QuantSpec

pytestmark = pytest.mark.once

L = 10
CONFIG = llama_config(L)


def scores_of(values, config=CONFIG):
    return Scores(
        metric="given",
        values={f"block_{i}": float(v) for i, v in enumerate(values)},
        model="m",
        shapes=model_shapes(config),
        other_weights=other_weights(config),
    )


SCORES = scores_of([3, 9, 1, 7, 5, 0, 8, 2, 6, 4])


def widths(plan):
    return plan.bits_per_block()


def test_the_papers_rule_for_two_widths():
    """40 blocks at 3.5 code bits: 30 at four bits and 10 at two, the least important ones."""
    config = llama_config(40)
    scores = scores_of(np.random.default_rng(0).permutation(40), config)
    plan = allocate(scores, bpw=mean_bpw(scores, {4: 30, 2: 10}), bits=(2, 4), spec=QuantSpec(bits=4, symmetric=True))
    assert plan.code_bits == 3.5
    low = {i for i, bits in enumerate(widths(plan)) if bits == 2}
    assert low == {int(unit.removeprefix("block_")) for unit in scores.ranking()[30:]}


def mean_bpw(scores, counts):
    """bpw of a plan with so many equal blocks at each width, symmetric, groups of 128."""
    shapes = [s for p, s in scores.shapes.items() if p.startswith("block_0/")]
    total = sum(map(math.prod, shapes))
    size = {b: sum(QuantSpec(bits=b, symmetric=True).size_bits(s) for s in shapes) for b in counts}
    return sum(n * size[b] for b, n in counts.items()) / (sum(counts.values()) * total)


@settings(max_examples=80, deadline=None)
@given(
    st.permutations(range(L)),
    st.sets(st.integers(1, 8), min_size=2, max_size=5),
    st.floats(0, 1),
    st.sampled_from([32, 64, None]),
    st.booleans(),
)
def test_the_budget_is_met_within_one_step_and_never_exceeded(order, bits, fraction, group_size, symmetric):
    spec = QuantSpec(bits=4, group_size=group_size, symmetric=symmetric)
    ends = [uniform_plan(CONFIG, dataclasses.replace(spec, bits=b)).bpw for b in (min(bits), max(bits))]
    target = ends[0] + fraction * (ends[1] - ends[0])
    scores = scores_of(order)
    plan = allocate(scores, bpw=target, bits=tuple(bits), spec=spec)
    assert plan.bpw <= target + 1e-9
    total = sum(math.prod(s) for p, s in plan.shapes.items() if p.startswith("block_"))
    block = [s for p, s in plan.shapes.items() if p.startswith("block_0/")]
    cost = {b: sum(dataclasses.replace(spec, bits=b).size_bits(s) for s in block) for b in bits}
    steps = [cost[b] - cost[a] for a, b in zip(sorted(bits), sorted(bits)[1:], strict=False)]
    raisable = [s for a, s in zip(sorted(bits), steps, strict=False) if a in widths(plan)]
    if raisable:
        assert (target - plan.bpw) * total < max(raisable) + 1
        assert (target - plan.bpw) * total < min(raisable) + 1
    ranked = [widths(plan)[int(unit.removeprefix("block_"))] for unit in scores.ranking()]
    assert ranked == sorted(ranked, reverse=True), "a more important block never gets fewer bits"


@pytest.mark.parametrize("method", ["greedy", "lagrangian", "knapsack", "milp"])
def test_a_loss_is_worth_bits_by_its_size_where_it_goes_by_value(method):
    """Of equal blocks every bit is worth four times less than the one before: 64 is worth three bits more than 1."""
    losses = scores_of([64.0] * 5 + [1.0] * 5)
    by_value = allocate(losses, bpw=3.0, bits=range(1, 9), method=method, costs="value")
    assert by_value.bpw <= 3.0
    high, low = widths(by_value)[:5], widths(by_value)[5:]
    assert min(high) - max(low) >= 2, "what is left over raises one or the other by a bit"
    assert max(high) - min(low) <= 4
    by_place = allocate(losses, bpw=3.0, bits=range(1, 9), method=method)
    assert by_place.provenance["costs"] == "place"
    stretched = scores_of(np.exp(list(losses.values.values())))
    assert allocate(stretched, bpw=3.0, bits=range(1, 9), method=method).specs == by_place.specs


def test_costs_that_are_none_are_refused():
    for values, line in (
        ({"costs": "value", "method": "rank"}, "costs: value, but rank goes by the place alone; write greedy"),
        ({"costs": "size"}, "costs: 'size'; write measured or place or value"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            allocate(SCORES, bpw=3.0, **values)
    negative = scores_of([-0.5] + [1.0] * (L - 1))
    with pytest.raises(UserError, match=r"^costs: value, but .* of block_0 is -0\.5, which is no loss; write place$"):
        allocate(negative, bpw=3.0, method="knapsack", costs="value")


def test_only_the_order_of_scores_matters():
    stretched = scores_of(np.exp(list(SCORES.values.values())))
    for target in (2.4, 3.0, 3.7):
        assert allocate(stretched, bpw=target).specs == allocate(SCORES, bpw=target).specs


def test_a_larger_budget_never_takes_bits_from_anyone():
    plans = [allocate(SCORES, bpw=b, bits=(2, 3, 4, 8)) for b in np.linspace(2.5, 7, 19)]
    for smaller, larger in itertools.pairwise(plans):
        assert larger.bpw >= smaller.bpw


def test_a_budget_that_equals_a_width_gives_that_width_to_all():
    for bits in (2, 3, 4):
        target = uniform_plan(CONFIG, QuantSpec(bits=bits)).bpw
        top = allocate(SCORES, bpw=target, bits=(bits,))
        assert set(widths(top)) == {bits}
    ends = [uniform_plan(CONFIG, QuantSpec(bits=b)).bpw for b in (2, 4)]
    assert set(widths(allocate(SCORES, bpw=ends[0]))) == {2}
    assert set(widths(allocate(SCORES, bpw=ends[1]))) == {4}


def test_bytes_are_a_budget_too():
    in_bits = allocate(SCORES, bpw=3.0)
    total = sum(math.prod(s) for p, s in in_bits.shapes.items() if p.startswith("block_"))
    in_bytes = allocate(SCORES, nbytes=3 * total // 8)
    assert in_bytes.specs == in_bits.specs


def test_ties_keep_the_deeper_block_low():
    assert widths(allocate(scores_of([1] * L), bpw=3.0)) == tuple(
        sorted(widths(allocate(SCORES, bpw=3.0)), reverse=True)
    )


@pytest.mark.parametrize("target", [0.5, 2.0, 9.0])
def test_a_target_out_of_reach_says_the_range(target):
    with pytest.raises(UserError) as error:
        allocate(SCORES, bpw=target)
    low, high = (uniform_plan(CONFIG, QuantSpec(bits=b)).bpw for b in (2, 4))
    message = str(error.value)
    assert message.startswith(f"budget: {target:.4g} bits per weight cannot be met; widths 2, 4")
    reach = [float(word) for word in message.split("reach ")[1].split(" to ")]
    assert reach == pytest.approx([low, high], abs=1e-4)
    for end in reach:
        allocate(SCORES, bpw=end)  # either end can be copied into the next command


@pytest.mark.parametrize("budget", [{}, {"bpw": 3.0, "nbytes": 10}, {"bpw": -1.0}, {"bpw": float("nan")}])
def test_a_budget_is_one_positive_number(budget):
    with pytest.raises(UserError, match="budget: "):
        allocate(SCORES, **budget)


PIN = Pin(pattern="v_proj$", bits=8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bpw": "3"}, "bpw: '3' is not a number; write for example bpw=3.0"),
        ({"bpw": True}, "bpw: True is not a number"),
        ({"nbytes": 4e6}, "nbytes: 4000000.0 is not a whole number; write"),
        ({"bits": 4}, r"bits: 4 is no list of widths; write for example bits=\(2, 4\)"),
        ({"bits": "24"}, "bits: '24' is no list of widths"),
        ({"bits": (2, 4.0)}, r"bits: \(2, 4.0\) is no list of widths"),
        ({"bits": (2, [4])}, r"bits: \(2, \[4\]\) is no list of widths"),
        ({"spec": 4}, "spec: 4 is no QuantSpec; write for example QuantSpec"),
        ({"pins": [PIN, ("q_proj", 4)]}, r"pins: \('q_proj', 4\) is no Pin; write for example Pin\(pattern="),
        ({"pins": PIN}, "pins: Pin.* is no list"),
        ({"count": "everything"}, "count: 'everything'; write blocks or all"),
        ({"count": None}, "count: None; write blocks or all"),
    ],
)
def test_arguments_of_another_type_are_one_line(given, message):
    budget = {} if "nbytes" in given else {"bpw": 3.0}
    with pytest.raises(UserError, match=f"^{message}") as error:
        allocate(SCORES, **{**budget, **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"bpw": np.float32(3.0)}, {"bpw": 4, "bits": [2, 8]}, {"bpw": 3.0, "bits": {2, 4}}])
def test_numbers_and_lists_of_other_kinds_are_as_good(given):
    assert allocate(SCORES, **given).bpw <= given["bpw"]


def test_a_plan_is_made_of_specs():
    with pytest.raises(
        UserError, match=r"^plan: block_0/\S+: 3 is no QuantSpec; write for example QuantSpec\(bits=3\)$"
    ):
        uniform_plan(CONFIG, 3)
    with pytest.raises(UserError, match=r"^count: 'everything'; write blocks or all$"):
        uniform_plan(CONFIG, QuantSpec(bits=3), count="everything")


def test_pins_hold_and_unused_ones_are_reported():
    pins = [
        Pin(pattern=r"block_5/.*down_proj", bits=8),
        Pin(pattern="v_proj$", bits=16),
        Pin(pattern="nowhere", bits=3),
    ]
    plan = allocate(SCORES, bpw=4.5, pins=pins)
    assert plan.specs["block_5/mlp/down_proj"].bits == 8
    assert "block_2/attention/v_proj" not in plan.specs
    assert plan.provenance["unused_pins"] == ["nowhere"]
    assert plan.bpw <= 4.5


def test_where_pins_decide_everything_no_budget_is_needed():
    found = allocate(SCORES, bits=(2, 4), pins=[Pin(pattern=".", bits=4)])
    assert {spec.bits for spec in found.specs.values()} == {4}


def test_the_first_pin_that_matches_decides():
    plan = allocate(SCORES, bpw=2.8, pins=[Pin(pattern="block_0/mlp", bits=3), Pin(pattern="mlp", bits=2)])
    assert plan.specs["block_0/mlp/up_proj"].bits == 3
    assert plan.specs["block_1/mlp/up_proj"].bits == 2


def test_a_pin_that_earlier_ones_leave_nothing_is_not_called_unused():
    pins = [Pin(pattern="mlp", bits=3), Pin(pattern="block_0/mlp", bits=2), Pin(pattern="experts", bits=2)]
    provenance = allocate(SCORES, bpw=3.0, pins=pins).provenance
    assert provenance["shadowed_pins"] == ["block_0/mlp"]
    assert provenance["unused_pins"] == ["experts"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"embedding_bits": 9}, "embedding_bits: 9; write 1 to 8"),
        ({"head_bits": 0}, "head_bits: 0; write 1 to 8"),
        ({"head_bits": 4}, "this model's head is its embedding; write embedding_bits"),
    ],
)
def test_widths_the_tables_cannot_have_are_refused(tables, message):
    assert "head" not in SCORES.shapes
    with pytest.raises(UserError, match=message):
        allocate(SCORES, bpw=3.0, **tables)


def test_one_width_reaches_one_size():
    with pytest.raises(UserError, match=r"widths 4 .* make exactly 4\.\d{6}; leave the budget out"):
        allocate(SCORES, bpw=3.0, bits=(4,))
    plan = allocate(SCORES, bits=(4,), pins=[Pin(pattern="block_3/mlp", bits=8)])
    assert plan.specs["block_3/mlp/up_proj"].bits == 8
    assert {s.bits for p, s in plan.specs.items() if not p.startswith("block_3/mlp")} == {4}


@pytest.mark.parametrize(("pattern", "bits"), [("(", 4), (3, 4), ("x", 9), ("x", 0), ("x", 12), ("x", "4")])
def test_a_bad_pin_is_refused(pattern, bits):
    with pytest.raises(UserError, match="pin "):
        Pin(pattern=pattern, bits=bits)


def test_embedding_counts_only_when_asked():
    blocks = allocate(SCORES, bpw=3.0)
    assert "embed/tokens" not in blocks.specs
    with_table = allocate(SCORES, bpw=3.0, embedding_bits=4)
    assert with_table.specs["embed/tokens"].bits == 4
    assert with_table.bpw == blocks.bpw  # over the blocks, as stated
    assert with_table.nbytes < blocks.nbytes
    counted = allocate(SCORES, bpw=4.0, embedding_bits=4, count="all")
    assert counted.bpw <= 4.0
    assert counted.count == "all"
    total = sum(math.prod(s) for s in counted.shapes.values())
    assert counted.bpw == sum(counted.size_bits(p) for p in counted.shapes) / total


def test_matrices_can_be_units():
    paths = [p for p in SCORES.shapes if p.startswith("block_")]
    values = {p: float(i) for i, p in enumerate(paths)}
    plan = allocate(dataclasses.replace(SCORES, values=values), bpw=3.0)
    assert plan.bpw <= 3.0
    assert len({s.bits for p, s in plan.specs.items() if p.startswith("block_5/")}) >= 1
    assert plan.specs[paths[-1]].bits == 4
    assert plan.specs[paths[0]].bits == 2


def segmented(values, count=2, config=None):
    """Scores of the segments of every matrix of a model of two blocks, in the order of `values`."""
    config = config or llama_config(2)
    names = [f"{path}:{i}/{count}" for path in matrices(config) for i in range(count)]
    return dataclasses.replace(scores_of([], config), values=dict(zip(names, values, strict=True)))


def test_segments_of_a_matrix_can_be_units():
    """Each at its width; a matrix whose segments all get one is not cut, and its groups are by energy all the same."""
    config = llama_config(2)
    values = np.random.default_rng(0).permutation(2 * len(matrices(config)))
    spec = QuantSpec(bits=4, group_size=32)
    plan = allocate(segmented(values), bpw=4.3, bits=(2, 4), spec=spec)
    assert plan.bpw <= 4.3
    cut = {path: found.widths for path, found in plan.specs.items() if found.widths is not None}
    assert cut, "or nothing was shown"
    assert set(cut.values()) <= {(2, 4), (4, 2)}
    ranking = segmented(values).ranking()
    wide = [unit for unit in ranking if unit_width(plan, unit) == 4]
    assert ranking.index(wide[-1]) < len(wide) + 4, "but for those that did not fit, the most important ones"
    whole = [path for path in plan.specs if path not in cut]
    assert {plan.specs[path] for path in whole} <= {dataclasses.replace(spec, bits=b, by_energy=True) for b in (2, 4)}
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    codes = sum(found.code_bits * math.prod(plan.shapes[path]) for path, found in plan.specs.items())
    assert plan.code_bits == codes / sum(math.prod(plan.shapes[path]) for path in plan.specs)


def unit_width(plan, unit):
    path, place = unit.split(":")
    spec = plan.specs[path]
    return spec.bits if spec.widths is None else spec.widths[int(place.split("/")[0])]


def test_segments_must_make_up_their_matrices():
    config, spec = llama_config(2), QuantSpec(bits=4, group_size=32)
    whole = segmented(range(2 * len(matrices(config))))
    first, *rest = whole.values
    path = first.split(":")[0]
    missing = dataclasses.replace(whole, values={unit: whole.values[unit] for unit in rest})
    with pytest.raises(UserError, match=f"no value for {path}"):
        allocate(missing, bpw=3.5, bits=(2, 4), spec=spec)
    for extra in (path, f"{path}:0/4"):
        with pytest.raises(UserError, match=f"for {path}"):
            allocate(dataclasses.replace(whole, values=whole.values | {extra: 1.0}), bpw=3.5, bits=(2, 4), spec=spec)
    second = f"{path}:1/2"
    for other in (f"{path}:2/2", f"{path}:5/2", f"{path}:00/2"):
        values = {other if unit == second else unit: value for unit, value in whole.values.items()}
        line = f"scores given: no value for {path}:1/2; score this very model with `lq score`"
        with pytest.raises(UserError, match=f"^{line}$"):
            allocate(dataclasses.replace(whole, values=values), bpw=3.5, bits=(2, 4), spec=spec)
    with pytest.raises(UserError, match="has no 2 segments of whole groups of 128; write a smaller group size"):
        allocate(whole, bpw=3.5, bits=(2, 4), spec=QuantSpec(bits=4))
    measured = dataclasses.replace(
        whole, costs={unit: {f"int{b}-g{g}": 1.0 / b for b in (2, 4) for g in (32, 64)} for unit in whole.values}
    )
    with pytest.raises(UserError, match="group_sizes: the segments of a matrix share one"):
        allocate(measured, bpw=3.5, bits=(2, 4), spec=spec, group_sizes=(32, 64), method="knapsack")
    for fields, line in (
        ({"group_size": None}, "group_size: a column is one group"),
        ({"group_size": 32, "by_energy": True}, "by_energy, mixed: groups of segments are by energy"),
        ({"group_size": 128, "mixed": True}, "by_energy, mixed: groups of segments are by energy"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            allocate(whole, bpw=3.5, bits=(2, 4), spec=QuantSpec(bits=4, **fields))


def test_scores_must_fit_the_model():
    with pytest.raises(UserError, match="no value for block_9"):
        allocate(dataclasses.replace(SCORES, values={f"block_{i}": 1.0 for i in range(9)}), bpw=3.0)
    with pytest.raises(UserError, match="unit block_10 is not in this model"):
        allocate(dataclasses.replace(SCORES, values={f"block_{i}": 1.0 for i in range(11)}), bpw=3.0)


def test_a_plan_survives_json(tmp_path):
    plan = allocate(SCORES, bpw=4.1, bits=(2, 3, 4), pins=[Pin(pattern="o_proj", bits=16)])
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"specs": []}', "[" * 100_000], ids=range(5))
def test_other_files_are_no_plans(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="not a plan"):
        Plan.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "damage", [{"count": "some"}, {"other_weights": "3"}, {"matrices": {"embed/tokens": [-1, [4, 4]]}}, {"specs": 3}]
)
def test_a_damaged_plan_is_one_line(tmp_path, damage):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**allocate(SCORES, bpw=3.0).to_dict(), **damage}))
    with pytest.raises(UserError, match=r"plan\.json: not a plan"):
        Plan.read(file)
