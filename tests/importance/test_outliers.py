"""Kurtosis and OWL's outlier share: known distributions, spikes, and direction."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.inputs import input_energies
from lq.importance.kurtosis import pooled_kurtosis, spikes
from lq.importance.owl import outlier_share
from lq.models.source import InMemory

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 16), np.int32), "random", "random")


@pytest.fixture(scope="module")
def source():
    config = llama_config(3)
    return InMemory(config, random_params(config, dtype=jnp.float32))


def with_weight(source, path, change):
    """The source with one matrix replaced by `change` of it."""
    block, part, name = path.split("/")
    params = dict(source.params())
    kernel = change(np.asarray(params[block][part][name]["kernel"]).copy())
    params[block] = {**params[block], part: {**params[block][part], name: {"kernel": jnp.asarray(kernel)}}}
    return InMemory(source.config, params)


@pytest.mark.parametrize(
    ("distribution", "expected", "eighth"),
    [(stats.norm(1.0, 2.0), 3.0, 105), (stats.uniform(-1, 2), 1.8, 9), (stats.laplace(), 6.0, 2520)],
)
def test_kurtosis_of_known_distributions(distribution, expected, eighth):
    weights = distribution.rvs((400, 1000), random_state=0).astype(np.float32)
    got = pooled_kurtosis([jnp.asarray(weights[:100]), jnp.asarray(weights[100:])])
    # The fourth moment of 400,000 standardized draws: four standard errors, from the eighth moment.
    assert got == pytest.approx(expected, abs=4 * math.sqrt(eighth / 400_000) + 0.01)
    assert got == pytest.approx(stats.kurtosis(weights.ravel().astype(float), fisher=False), rel=1e-5)


def test_kurtosis_of_two_values_and_of_one():
    assert pooled_kurtosis([jnp.asarray([[1.0, -1.0]])]) == 1.0
    assert pooled_kurtosis([jnp.zeros((3, 3))]) == 0.0


def test_a_spike_is_marked_on_the_way_up_alone():
    series = 3.0 + 0.01 * np.random.default_rng(0).standard_normal(32)
    series[4] = 9.0
    found = spikes(series)
    assert np.flatnonzero(found > 3).tolist() == [4]
    assert found[0] == 0.0
    np.testing.assert_array_equal(spikes(np.full(8, 2.0)), np.zeros(8))
    np.testing.assert_array_equal(spikes(np.array([5.0])), [0.0])


@pytest.mark.parametrize("rule", ["value", "spike"])
def test_kurtosis_ranks_the_matrix_with_an_outlier_first(source, rule):
    planted = "block_1/mlp/up_proj"
    changed = with_weight(
        source, planted, lambda w: np.where(np.arange(w.size).reshape(w.shape) == 70, 50 * w.std(), w)
    )
    assert score(changed, "kurtosis", options={"rule": rule}).ranking()[0] == planted
    assert score(changed, "kurtosis", options={"unit": "block"}).ranking()[0] == "block_1"


def test_spikes_are_of_matrices():
    with pytest.raises(UserError, match=r"^rule: spike, but unit block: spikes are of one type of matrix; write unit:"):
        METRICS.options("kurtosis", {"rule": "spike", "unit": "block"})


@pytest.mark.parametrize(("threshold", "expected"), [(1.0, None), (3.0, 0.01668)])
def test_outlier_share_of_normal_weights_and_equal_inputs(threshold, expected):
    expected = expected or math.erfc(threshold / math.sqrt(math.pi))
    assert expected == pytest.approx(math.erfc(threshold / math.sqrt(math.pi)), rel=1e-3)
    weights = np.random.default_rng(0).standard_normal((500, 800)).astype(np.float32)
    got = outlier_share([jnp.asarray(weights)], [jnp.full(500, 0.3)], threshold)
    assert got == pytest.approx(expected, abs=4 * math.sqrt(expected / weights.size) + 1e-4)


def test_equal_weights_and_inputs_have_no_outliers():
    assert outlier_share([jnp.ones((8, 8))], [jnp.ones(8)], 1.5) == 0.0


def test_outlier_share_equals_float64(source):
    energies = input_energies(source, WINDOWS, 2)
    got = score(source, "owl", WINDOWS, {"threshold": 3.0}).values
    for index in range(3):
        metric = []
        for path, energy in energies.items():
            if path.startswith(f"block_{index}/"):
                _, part, name = path.split("/")
                weight = np.asarray(source.block(index)[part][name]["kernel"], np.float64)
                metric.append((np.abs(weight) * np.sqrt(np.asarray(energy, np.float64))[:, None]).ravel())
        metric = np.concatenate(metric)
        share = (metric > 3.0 * metric.mean()).mean()
        assert got[f"block_{index}"] == pytest.approx(share, abs=2 / metric.size), "but for ties in float32"


def test_input_energies_do_not_depend_on_batches(source):
    one, other = input_energies(source, WINDOWS, 4), input_energies(source, WINDOWS, 1)
    for path, energy in one.items():
        np.testing.assert_allclose(energy, other[path], rtol=1e-5)


def test_owl_ranks_the_block_with_outliers_first(source):
    def heavy(w):
        w[3, :40] *= 40
        return w

    changed = with_weight(source, "block_2/mlp/gate_proj", heavy)
    assert score(changed, "owl", WINDOWS).ranking()[0] == "block_2"


@pytest.mark.parametrize("metric", ["kurtosis", "owl"])
def test_a_weight_that_is_not_finite_is_named(source, metric):
    changed = with_weight(source, "block_1/mlp/up_proj", lambda w: np.where(w == w[2, 2], np.nan, w))
    with pytest.raises(UserError, match=rf"^metric {metric}: block_1/mlp/up_proj: a weight is NaN or infinite;"):
        score(changed, metric, WINDOWS)
