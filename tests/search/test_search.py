"""A search on a model: it stays within the size, loses less on the text it saw, and says what it did."""

import dataclasses
import itertools

import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.allocation import allocate, uniform_plan
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import candidates, evaluate, make_reference
from lq.importance import score
from lq.importance.units import members
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.search import search

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 16), np.int32), "random", "random")
SPEC = QuantSpec(bits=3, group_size=32)


@pytest.fixture(scope="module")
def source():
    config = llama_config(3)
    return InMemory(config, random_params(config))


@pytest.fixture(scope="module")
def plan(source):
    """Four of six parts at three bits, in a bad order: the least damaging first."""
    scores = score(source, "random", options={"seed": 3})
    return allocate(scores, bpw=3.2, bits=(2, 3, 4), spec=SPEC)


def lost(source, plan):
    reference = make_reference(source, WINDOWS, batch_size=2)
    return evaluate(PlannedSource(source, plan.specs, Recipe()), WINDOWS, reference=reference, batch_size=2).kl


@pytest.mark.long
def test_what_is_found_loses_less_in_no_more_bits(source, plan):
    seen = []
    options = {"generations": 6, "offspring": 6, "survivors": [1], "windows": [4]}
    found = search(source, plan, WINDOWS, options=options, batch_size=2, on_generation=seen.append)
    assert found.bpw <= plan.bpw
    assert lost(source, found) < lost(source, plan)
    # All text in one stage: what is reported is what the evaluation says, and no generation is worse.
    assert seen[-1].loss == pytest.approx(lost(source, found), rel=1e-3, abs=1e-6)
    assert len(seen) == 6
    assert all(after.loss <= before.loss for before, after in itertools.pairwise(seen))
    assert found.provenance["search"] == "evolution"
    assert found.provenance["began_with"] == plan.provenance
    # The reference; in every generation six children and the parent, which share what they begin with.
    assert 1 + 6 < found.provenance["passes"] < 1 + 6 * 7
    assert search(source, plan, WINDOWS, options=options, batch_size=2).specs == found.specs


def test_units_change_together_and_what_is_dense_stays(source, plan):
    dense = {path: spec for path, spec in plan.specs.items() if "block_1/mlp" not in path}
    some = dataclasses.replace(plan, specs=dense)
    options = {"generations": 3, "offspring": 3, "survivors": [2, 1], "windows": [1, 2]}
    compiled = []
    count = lambda _: compiled.append(candidates._chosen_block._cache_size())  # noqa: E731
    found = search(source, some, WINDOWS, unit="part", options=options, batch_size=2, on_generation=count)
    assert len(set(compiled)) == 1, "new plans are no new programs"
    assert found.specs.keys() == dense.keys()
    for block in range(3):
        assert len({spec for path, spec in found.specs.items() if path.startswith(f"block_{block}/attention")}) == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("refine", {"generations": 2}),
        ("amq", {"generations": 2, "initial": 10, "evaluations": 4, "population": 12, "inner": 3}),
    ],
)
def test_the_others_lose_no_more_than_the_start(source, plan, method, options):
    seen = []
    found = search(
        source, plan, WINDOWS, unit="part", method=method, options=options, batch_size=2, on_generation=seen.append
    )
    assert found.bpw <= plan.bpw
    assert lost(source, found) <= lost(source, plan) * (1 + 1e-3)
    assert seen[-1].loss == pytest.approx(lost(source, found), rel=1e-3, abs=1e-6)
    assert found.provenance["search"] == method
    assert ("front" in found.provenance) == (method == "amq")
    for one in found.provenance.get("front", []):
        widths = dict(zip(found.provenance["units"], one["options"], strict=True))
        specs = {
            path: dataclasses.replace(SPEC, bits=found.provenance["bits"][int(digit)])
            for unit, digit in widths.items()
            for path in members(unit, found.specs)
        }
        there = dataclasses.replace(found, specs=specs)
        assert sum(map(there.size_bits, specs)) == one["size_bits"]
        assert lost(source, there) == pytest.approx(one["loss"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "given", "line"),
    [
        ({"shapes": {}, "specs": {}}, {}, "plan: made for another model; make it from this model's scores"),
        ({}, {"bits": (2, 4)}, "bits: 2, 4, but the plan has 3; add it"),
        (
            {},
            {"method": "evolutoin"},
            "unknown search 'evolutoin'; known: evolution, amq, refine, descent; did you mean evolution?",
        ),
        ({}, {"options": {"offspring": 0}}, "offspring: 0; write 1 or more"),
    ],
)
def test_what_cannot_be_searched(source, plan, change, given, line):
    with pytest.raises(UserError) as refused:
        search(source, dataclasses.replace(plan, **change), WINDOWS, **given)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("method", "options"), [("evolution", {}), ("refine", {}), ("amq", {}), ("descent", {"segment_channels": None})]
)
def test_segments_are_not_exchanged_as_whole_matrices(source, method, options):
    plan = uniform_plan(source.config, SPEC)
    cut = {**plan.specs, "block_0/mlp/up_proj": dataclasses.replace(SPEC, bits=4, widths=(4, 2))}
    line = r"^plan: matrices of segments, where whole ones are exchanged; write method descent with a number of seg"
    with pytest.raises(UserError, match=line):
        search(source, dataclasses.replace(plan, specs=cut), WINDOWS, method=method, options=options)


def test_formats_and_units_that_differ_are_refused(source):
    plan = uniform_plan(source.config, SPEC)
    path = "block_0/mlp/up_proj"
    other = dataclasses.replace(plan, specs={**plan.specs, path: dataclasses.replace(SPEC, group_size=64)})
    with pytest.raises(UserError, match=r"^plan: block matrices of 2 formats, where a search takes one"):
        search(source, other, WINDOWS)
    uneven = dataclasses.replace(plan, specs={**plan.specs, path: dataclasses.replace(SPEC, bits=4)})
    with pytest.raises(UserError, match=r"^unit: block_0/mlp has several widths in the plan; write a smaller unit"):
        search(source, uneven, WINDOWS, unit="part")
