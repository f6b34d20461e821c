"""Descent: what a step from a plan is foretold to cost, and plans that lose less within their size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params
from whole_model import in_float64, kernels_of, with_kernels

from lq.allocation import allocate, uniform_plan
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import score
from lq.importance.backward import Backward
from lq.importance.predicted import PredictedOptions, UnitErrors
from lq.importance.units import segment_of
from lq.models.decoder import Decoder
from lq.models.source import InMemory
from lq.numerics.segmented import is_packed
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, Recipe, quantized_source
from lq.search import search
from lq.search.descent import DescentOptions, _Units, descend

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 24), np.int32), "random", "random")
RTN = Recipe(method="rtn", options=QUANTIZERS.options("rtn", {"clip": "opt", "importance": True}))
SPEC = QuantSpec(bits=4, group_size=32)
SCORED = WINDOWS.tokens[:, 1:].size
BITS = (2, 3, 4)


@pytest.fixture(scope="module")
def source():
    """Of large weights, whose rounding is seen in the outputs."""
    config = llama_config(2)
    return InMemory(config, jax.tree.map(lambda a: a * 3.0 if a.ndim > 1 else a, random_params(config)))


def rounded(source, plan, recipe=RTN):
    """The model that a plan gives, dense."""
    found = quantized_source(source, plan.specs, recipe, WINDOWS, batch_size=2)
    dense = lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf.astype(jnp.float32)  # noqa: E731
    parts = {name: found.part(name) for name in ("embed", "block_0", "block_1")}
    return InMemory(source.config, {**jax.tree.map(dense, parts, is_leaf=is_packed), "head": source.head()})


def lost(source, plan, recipe=RTN):
    reference = make_reference(source, WINDOWS, batch_size=2)
    return evaluate(rounded(source, plan, recipe), WINDOWS, reference=reference, batch_size=2).kl


def second_order(source, point, step) -> tuple[float, float]:
    """Along a step from `point` the slope of the KL divergence to `source`, per scored token, and half the mean square
    of the slopes of log-probabilities at `source`. float64."""
    with jax.enable_x64(True):
        config, tokens = source.config, WINDOWS.tokens
        clean, here = in_float64(source.params()), in_float64(point.params())
        step = {path: jnp.asarray(change, jnp.float64) for path, change in step.items()}

        def log_p(params, moved):
            chosen = kernels_of(config, params) | moved
            logits = Decoder(config).apply({"params": with_kernels(params, chosen)}, tokens)
            return jax.nn.log_softmax(logits[:, :-1])

        at = lambda params: {path: jnp.asarray(kernels_of(config, params)[path]) for path in step}  # noqa: E731
        truth, slope = jax.jvp(lambda moved: log_p(clean, moved), (at(clean),), (step,))
        _, lost = jax.jvp(lambda moved: log_p(here, moved), (at(here),), (step,))
        p = jnp.exp(truth)
        return float(-(p * lost).sum() / SCORED), float(0.5 * (p * slope**2).sum() / SCORED)


def test_a_step_costs_its_slope_at_the_plan_and_a_curvature(source):
    """In float64. A curvature is the mean of 256 squares of sums, and off by a share of sqrt(2 / 256)."""
    bits = (2, 3, 8)
    method = {"bits": list(bits), "group_size": 32, "options": dataclasses.asdict(RTN.options)}
    priced = PredictedOptions(unit="matrix", draws=64, batch_size=2, **method)
    errors = UnitErrors(source, WINDOWS, priced)
    clean = Backward(source, WINDOWS, loss="sampled", draws=64, batch_size=2)
    products, gradients = errors.products(clean, source)
    formats = [dataclasses.replace(SPEC, bits=width) for width in bits]
    units = _Units.of(uniform_plan(source.config, SPEC), formats, products, gradients.tokens / len(gradients.losses))
    names, judge = list(units.choices.free), Backward(source, WINDOWS, loss="kl", batch_size=2)
    now = np.ones(len(names), int)
    model, wide = (rounded(source, units.plan(np.full(len(names), option))) for option in (1, 2))
    slopes, _ = errors.products(judge, model)
    costs = units.costs_around(now, slopes, judge.tokens)
    here, there = kernels_of(source.config, model.params()), kernels_of(source.config, wide.params())
    assert (costs[:, 1] == 0).all()
    for unit, cost in zip(names, costs, strict=True):
        slope, curvature = second_order(source, model, {unit: np.asarray(there[unit], float) - here[unit]})
        off = 2e-3 * abs(slope) + 5 * np.sqrt(2 / 256) * curvature  # one in a million is beyond
        assert cost[2] == pytest.approx(slope + curvature, abs=off)
        assert abs(slope) > 1e-6


@pytest.mark.parametrize("segments", ["group", 64, None])
def test_it_loses_less_in_no_more_bits(source, segments):
    plan = allocate(score(source, "parameter_count"), bpw=3.4, bits=BITS, spec=SPEC, costs="place", method="knapsack")
    seen = []
    found = search(
        source,
        plan,
        WINDOWS,
        bits=BITS,
        method="descent",
        options={"segment_channels": segments, "draws": 4},
        recipe=RTN,
        batch_size=2,
        on_generation=lambda generation: seen.append(generation.loss),
    )
    assert found.bpw <= plan.bpw
    assert seen == sorted(seen, reverse=True)
    assert 1 <= len(seen) <= 2
    assert lost(source, found) < lost(source, plan)
    assert lost(source, found) == pytest.approx(seen[-1], rel=1e-3)
    assert any(spec.widths is not None for spec in found.specs.values()) == (segments is not None)
    assert found.provenance["search"] == "descent"
    assert found.provenance["began_with"] == plan.provenance
    # The original twice, 4 draws of two passes, start and first plan; a round of 3 passes and 1 to 5 plans.
    assert 1 + 2 + 8 + 2 + 4 <= found.provenance["passes"] <= 1 + 2 + 8 + 2 + 2 * 8


def test_what_is_dense_stays_and_a_better_start_is_kept(source):
    whole = uniform_plan(source.config, SPEC)
    some = dataclasses.replace(whole, specs={p: s for p, s in whole.specs.items() if "block_1/mlp" not in p})
    options = DescentOptions(generations=0, segment_channels=None, draws=1)
    (found,) = descend(source, some, WINDOWS, (2, 3, 4), RTN, 2, options)
    assert found.plan.specs == some.specs, "four bits everywhere is what there is room for"
    # With labels of one draw the prices of this text are poor; a plan that descent itself made is not left for them.
    options = DescentOptions(generations=1, segment_channels=32, draws=1)
    *_, once = descend(
        source, allocate(score(source, "random"), bpw=3.4, bits=BITS, spec=SPEC), WINDOWS, BITS, RTN, 2, options
    )
    first, *_ = descend(source, once.plan, WINDOWS, BITS, RTN, 2, options)
    assert first.loss <= once.loss * (1 + 1e-5)
    assert all(segment_of(unit) is None for unit in once.plan.specs)


def test_a_start_that_is_no_choice_is_beaten_or_given_back(source):
    """Four bits everywhere: segments of the same size have a byte a channel less for codes."""
    plan = uniform_plan(source.config, SPEC)
    options = DescentOptions(generations=0, segment_channels=32, draws=1)
    (found,) = descend(source, plan, WINDOWS, BITS, RTN, 2, options)
    assert found.loss <= lost(source, plan) * (1 + 1e-3)
    cut = dataclasses.replace(SPEC, widths=(4, 3))
    of_two = {path: cut if cut.segmentable(plan.shapes[path], 2) else SPEC for path in plan.specs}
    (found,) = descend(source, dataclasses.replace(plan, specs=of_two), WINDOWS, BITS, RTN, 2, options)
    assert found.plan.bpw <= dataclasses.replace(plan, specs=of_two).bpw


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"bits": (2, 3)}, "bits: 2, 3, but the plan has 4; add it"),
        ({"bits": (4, 5)}, "plan: 340992 bits, but segments"),
        (
            {"options": {"segment_channels": 0}},
            "segment_channels: 0, in groups of 32; write 32 or a multiple of it; or, for whole matrices, write the ",
        ),
        ({"recipe": Recipe(method="rtn", scaling="smoothquant")}, "descent: smoothquant + rtn changes more than"),
        ({"options": {"generations": -1}}, "generations: -1; write 0 or more"),
        ({"bits": (4, 9)}, "bits: 9 is not a width lq can store; write a whole number from 1 to 8"),
        ({"unit": "block"}, "unit: block, but descent has segments or matrices; write its option segment_channels"),
        ({"options": {"segment_channels": 48}}, "segment_channels: 48, in groups of 32; write 32 or a multiple of"),
        ({"recipe": Recipe()}, "by_energy: groups of channels by the energy of the inputs, which rtn does not look at"),
        (
            {"recipe": Recipe(method="hqq")},
            "unit: segment, but no segments of hqq are priced; write method rtn or gptq",
        ),
    ],
)
def test_what_cannot_be(source, given, line):
    with pytest.raises(UserError) as refused:
        search(source, uniform_plan(source.config, SPEC), WINDOWS, method="descent", **{"recipe": RTN, **given})
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"draws": 0}, "draws: 0; write 1 or more"),
        ({"seed": -1}, "seed: -1; write a whole number from 0 to 2147483647"),
    ],
)
def test_of_what_is_not_about_segments_whole_matrices_are_no_remedy(options, line):
    with pytest.raises(UserError) as refused:
        DescentOptions(**options)
    assert str(refused.value) == line


def test_embedding_and_head_keep_what_the_plan_gives_them(source):
    """And are judged dense."""
    plan = uniform_plan(source.config, SPEC)
    tables = dataclasses.replace(plan, specs={**plan.specs, "embed/tokens": dataclasses.replace(SPEC, bits=2)})
    options = DescentOptions(generations=0, segment_channels=None, draws=1)
    (without,), (found,) = (descend(source, one, WINDOWS, BITS, RTN, 2, options) for one in (plan, tables))
    assert found.plan.specs == without.plan.specs | {"embed/tokens": tables.specs["embed/tokens"]}
    assert found.loss == without.loss


def test_groups_without_segments(source):
    """A column that is one group has no segments; whole matrices it has."""
    plan = uniform_plan(source.config, dataclasses.replace(SPEC, group_size=None))
    line = r"write one number; or, for whole matrices, write the option segment_channels null$"
    with pytest.raises(UserError, match=line):
        search(source, plan, WINDOWS, method="descent", recipe=RTN)
    options = DescentOptions(generations=0, segment_channels=None, draws=1)
    (found,) = descend(source, plan, WINDOWS, BITS, RTN, 2, options)
    assert found.plan.specs == plan.specs


def test_plans_it_has_no_prices_for(source):
    plan = uniform_plan(source.config, SPEC)
    path = "block_0/mlp/up_proj"
    other = dataclasses.replace(plan, specs={**plan.specs, path: dataclasses.replace(SPEC, symmetric=True)})
    with pytest.raises(UserError, match=r"^plan: block matrices of 2 formats, where a search takes one"):
        search(source, other, WINDOWS, method="descent", recipe=RTN)
    other = dataclasses.replace(plan, specs={**plan.specs, path: dataclasses.replace(SPEC, by_energy=True)})
    with pytest.raises(UserError, match=r"^plan: block matrices of 2 formats, where a search takes one"):
        search(source, other, WINDOWS, method="descent", recipe=RTN, options={"segment_channels": None})
    ranked = uniform_plan(source.config, dataclasses.replace(SPEC, rank=4))
    with pytest.raises(UserError, match=r"^plan: mixed or of some rank, which descent does not price"):
        search(source, ranked, WINDOWS, method="descent", recipe=RTN)
