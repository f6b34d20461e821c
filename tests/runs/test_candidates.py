"""The models of a run are made under one convention: what is counted, how wide the tables are, what is pinned."""

import json
import math

import pytest
import yaml
from pydantic import ValidationError
from small_models import llama_config

from lq.errors import UserError
from lq.importance import Scores
from lq.models.matrices import model_shapes, other_weights
from lq.runs.candidates import candidates, check_budgets
from lq.runs.config import Experiment, dump_experiment

PINNED, DENSE = "block_1/mlp/down_proj", "block_2/attention/q_proj"


def experiment(count="all", **allocation):
    return Experiment.model_validate(
        {
            "model": "m",
            "output": "o",
            "quantization": {"group_size": 64},
            "allocation": {
                "budgets": [5.9 if count == "all" else 5.0],
                "orders": ["zd"],
                "embedding_bits": 4,
                "head_bits": 8,
                "count": count,
                "pins": [{"match": f"^{PINNED}$", "bits": 8}, {"match": f"^{DENSE}$", "bits": 16}],
                **allocation,
            },
            "baselines": {"uniform": [4, 2]},
            "moves": {"high": 4, "low": 2, "orders": ["zd"]},
        }
    )


@pytest.mark.parametrize("costs", ["measured", "value"])
def test_budgets_are_checked_whatever_costs_go_by(costs):
    """Before any score is known; pairs of width and group size have other ends than widths alone."""
    chosen = {"method": "knapsack", "costs": costs, "bits": [2, 4], "pins": [], "head_bits": 16, "embedding_bits": 16}
    sizes = {"group_sizes": [32, 128]} if costs == "measured" else {}
    check_budgets(experiment("blocks", **chosen, **sizes, budgets=[4.0]), llama_config(hidden=128))
    finer = experiment("blocks", **chosen, **sizes, budgets=[4.5])
    if sizes:
        check_budgets(finer, llama_config(hidden=128))
    else:
        with pytest.raises(UserError, match=r"budgets\.0: 4\.5 bits per weight cannot be met"):
            check_budgets(finer, llama_config(hidden=128))


def test_a_latency_limit_of_a_config(tmp_path):
    """Is read, written back as YAML, and holds."""
    config = llama_config(tied=False)
    table = {path: {"int2-g64": 1e-6, "int4-g64": 2e-6} for path in model_shapes(config)}
    (tmp_path / "times.json").write_text(json.dumps(table))
    latency = {"table": str(tmp_path / "times.json"), "seconds": 30e-6}
    x = experiment("blocks", method="knapsack", bits=[2, 4], latency=latency, budgets=[4.3], pins=[])
    assert yaml.safe_load(dump_experiment(x))["allocation"]["latency"] == latency
    check_budgets(x, config)
    plan = planned(x)["zd @ 4.3"]
    assert 0 < plan.provenance["seconds"] <= 30e-6
    assert plan.bpw < 3.5, "the budget alone would allow 4.3"
    for seconds in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="latency"):
            experiment(latency={**latency, "seconds": seconds})


def test_allocator_options_are_checked_with_the_config():
    assert experiment(method="annealing", options={"seed": 3}).allocation.options == {"seed": 3}
    with pytest.raises(ValidationError, match="allocator annealing: unknown option 'sed'"):
        experiment(method="annealing", options={"sed": 3})


def planned(x):
    """Name -> plan; block_2 is the most important, block_0 the least."""
    config = llama_config(tied=False)
    scores = Scores(
        metric="zd",
        values={f"block_{i}": float(i) for i in range(config.num_blocks)},
        model="f",
        shapes=model_shapes(config),
        other_weights=other_weights(config),
    )
    found = candidates(x, config, "f", {("zd", None): scores})
    return {candidate.name: candidate.plan for candidate in found if candidate.plan}


def bits_of(shape, width, group):
    """One asymmetric matrix: codes in words of 32, a scale of 16 bits and a zero point of the width per group."""
    inputs, outputs = shape
    groups = -(-inputs // group)
    words = math.ceil(width * inputs / 32) * outputs + groups * math.ceil(width * outputs / 32)
    return 32 * words + groups * 16 * outputs


@pytest.mark.parametrize("count", ["blocks", "all"])
def test_all_plans_of_a_run_agree_in_pins_tables_and_what_is_counted(count):
    plans = planned(experiment(count))
    plan = "zd @ 5.9" if count == "all" else "zd @ 5"
    assert {"uniform 4", "uniform 4, groups of 32", plan, "zd: 1 of 3 blocks at 2 bits"} <= set(plans)
    for name, plan in plans.items():
        assert plan.count == count, name
        assert plan.model == "f", name
        assert plan.specs["embed/tokens"].bits == 4, name
        assert plan.specs["head"].bits == 8, name
        assert plan.specs[PINNED].bits == 8, name
        assert DENSE not in plan.specs, name


@pytest.mark.parametrize(
    ("name", "width", "group"),
    [
        ("uniform 4", lambda block: 4, 64),
        ("uniform 2, groups of 32", lambda block: 2, 32),
        ("zd: 1 of 3 blocks at 2 bits", lambda block: 2 if block == "block_0" else 4, 64),
        ("zd: 3 of 3 blocks at 2 bits", lambda block: 2, 64),
    ],
)
@pytest.mark.parametrize("count", ["blocks", "all"])
def test_bits_per_weight_are_those_of_the_counted_weights(count, name, width, group):
    plan, fixed = planned(experiment(count))[name], {PINNED: 8, "embed/tokens": 4, "head": 8}
    bits = weights = 0
    for path, shape in model_shapes(llama_config(tied=False)).items():
        if count == "blocks" and not path.startswith("block_"):
            continue
        weights += math.prod(shape)
        own = fixed.get(path) or width(path.split("/")[0])
        bits += 16 * math.prod(shape) if path == DENSE else bits_of(shape, own, group)
    assert plan.bpw == pytest.approx(bits / weights)


def test_the_ends_of_the_moves_are_the_uniform_models():
    plans = planned(experiment())
    assert plans["zd: 0 of 3 blocks at 2 bits"].specs == plans["uniform 4"].specs
    assert plans["zd: 3 of 3 blocks at 2 bits"].specs == plans["uniform 2"].specs
    assert plans["zd: 3 of 3 blocks at 2 bits"].bpw == plans["uniform 2"].bpw


def test_pins_may_leave_nothing_to_choose():
    plans = planned(experiment(pins=[{"match": "", "bits": 8}], budgets=[]))
    assert {spec.bits for plan in plans.values() for spec in plan.specs.values()} == {8}
