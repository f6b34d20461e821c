"""What holds for every score of gradients: direction, order of windows, families, and quantizers that read text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from perturbed_models import OPTIONS, WINDOWS, small_source, weights
from random_models import TOKENS, random_model

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.perturbations import Perturbations
from lq.importance.units import units_of
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.quantizers.rtn import RTNOptions

pytestmark = pytest.mark.once

# Every choice that is another computation; small ones, of few probes and steps.
SCORES = {
    "delta_loss": {},
    "delta_loss at both ends": {"at": "ends"},
    "delta_loss of AutoScheme": {"at": "each", "loss": "nll", "form": "absolute"},
    "path_integral": {"steps": 2},
    "first_order": {},
    "fisher": {},
    "fisher of drawn labels": {"labels": "model"},
    "hessian_trace": {"probes": 2, "loss": "kl"},
    "hessian_trace of the text": {"probes": 2},
    "relevance": {},
}


def options_of(name, unit="block"):
    known = {field.name for field in dataclasses.fields(METRICS[name.split()[0]].options)}
    return {key: value for key, value in (OPTIONS | {"unit": unit} | SCORES[name]).items() if key in known}


def scored(source, name, windows=WINDOWS, **more):
    return score(source, name.split()[0], windows, options_of(name) | more)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "hessian_trace of the text"])  # not trained on it
@pytest.mark.parametrize("planted", [0, 2])
def test_a_block_that_writes_more_is_first(name, planted):
    source = small_source(3)
    # Relevance has none of what dominates the stream altogether: embeddings are of size 1/64 here.
    large, small = (0.02, 0.0002) if name == "relevance" else (10.0, 0.01)
    params = dict(source.params())
    for index in range(3):
        factor = large if index == planted else small
        block = dict(params[f"block_{index}"])
        for part, matrix in (("attention", "o_proj"), ("mlp", "down_proj")):
            block[part] = {**block[part], matrix: {"kernel": factor * block[part][matrix]["kernel"]}}
        params[f"block_{index}"] = block
    clip = {"options": {"clip": "mse"}} if name == "first_order" else {}  # of larger errors other signs add up
    assert scored(InMemory(source.config, params), name, **clip).ranking()[0] == f"block_{planted}"


@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_windows_does_not_matter(name):
    source = small_source(3)
    turned = dataclasses.replace(WINDOWS, tokens=WINDOWS.tokens[::-1].copy())
    one, other = (scored(source, name, windows) for windows in (WINDOWS, turned))
    size = max(map(abs, one.values.values()))
    assert other.values == pytest.approx(one.values, rel=1e-5, abs=1e-5 * size)
    assert scored(source, name) == one, "to the bit"


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SCORES if " " not in name])
def test_experts(name):
    config, params = random_model("mixtral, untied")
    source = InMemory(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))
    got = scored(source, name, Windows(TOKENS, "random", "random"), unit="part")
    assert list(got.values) == list(units_of(config, "part"))
    assert len(set(got.values.values())) == len(got.values)


def test_a_quantizer_that_reads_text_is_asked_once():
    """Its blocks come in order only; the way back asks for the last one first."""
    source = small_source()
    given = OPTIONS | {"method": "gptq", "bits": [3]}
    found = Perturbations(source, WINDOWS, METRICS.options("fisher", given))
    backwards = {index: found.matrices(index, 0) for index in (1, 0)}
    rounded = Perturbations(source, WINDOWS, METRICS.options("fisher", OPTIONS | {"bits": [3]}))
    for path, weight in weights(source).items():
        block, within = path.split("/", 1)
        mine, other = (
            np.asarray(one[within]) for one in (backwards[int(block[-1])], rounded.matrices(int(block[-1]), 0))
        )
        assert 0 < np.linalg.norm(mine - weight) < 0.5 * np.linalg.norm(weight)
        assert not np.array_equal(mine, other)


def test_a_model_moved_all_the_way_is_the_quantized_one():
    source = small_source()
    found = Perturbations(source, WINDOWS, METRICS.options("fisher", OPTIONS))
    specs = dict.fromkeys(matrices(source.config), QuantSpec(bits=2, group_size=32))
    quantized = PlannedSource(source, specs, Recipe(options=RTNOptions(clip="none")))
    for share, expected in ((0.0, source), (1.0, quantized)):
        got = found.model(0, share)
        for path, weight in weights(expected).items():
            np.testing.assert_array_equal(weights(got)[path], weight)
        jax.tree.map(np.testing.assert_array_equal, got.head(), source.head())


def test_what_changes_more_than_matrices_is_refused():
    with pytest.raises(UserError, match=r"^awq changes more of block_\d than its matrices, of which alone a cost"):
        score(small_source(), "fisher", WINDOWS, OPTIONS | {"method": "awq", "options": {}})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fisher", "block_0 is packed already, and options are made from dense weights; give the original"),
        ("relevance", "block_0 is packed, and gradients are of dense weights; score the original"),
    ],
)
def test_a_packed_model_is_refused(name, reason):
    source = small_source()
    packed = PlannedSource(source, {"block_0/mlp/up_proj": QuantSpec(bits=4, group_size=32)}, Recipe())
    with pytest.raises(UserError, match=f"^{reason}"):
        scored(packed, name)
