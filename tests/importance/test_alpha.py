"""Power-law exponents: samples of known ones, the effect of shape, and direction."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.alpha import AlphaOptions, distance, hill, matrix_alpha, peak_alpha
from lq.models.source import InMemory

pytestmark = pytest.mark.once


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_hill_finds_the_exponent_of_a_pareto_sample(exponent):
    """Of n numbers the estimate of alpha - 1 has a relative standard error of 1 / sqrt(n)."""
    sample = np.sort(np.random.default_rng(0).pareto(exponent - 1, 20_000) + 1)
    for found in (hill(sample, 10_000), hill(sample, 0)):
        assert found == pytest.approx(exponent, abs=4 * (exponent - 1) / np.sqrt(10_000))
    assert distance(sample, 0) < 1.6 / np.sqrt(20_000), "the 99 % quantile of Kolmogorov's distribution"


def test_the_peak_leaves_out_what_is_no_tail():
    """A bulk of small eigenvalues under a tail: half the sample is no power law at all."""
    rng = np.random.default_rng(0)
    found = np.sort(np.concatenate([rng.uniform(0.5, 1.0, 5_000), rng.pareto(1.5, 5_000) + 1]))
    assert peak_alpha(found) == pytest.approx(2.5, abs=0.2)


@pytest.mark.parametrize("tail", ["middle", "peak"])
def test_scale_does_not_matter(tail):
    weight = jnp.asarray(np.random.default_rng(0).standard_t(3, (96, 128)), jnp.float32)
    options = AlphaOptions(tail=tail)
    assert matrix_alpha(64.0 * weight, options) == pytest.approx(matrix_alpha(weight, options), rel=1e-4)


def test_windows_take_out_the_shape():
    """Normal weights of three shapes: as they are, exponents of 2.1 to 3.5; in square windows, all alike."""
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.standard_normal((256, n)), jnp.float32) for n in (256, 512, 1024)]
    whole = [matrix_alpha(weight, AlphaOptions()) for weight in weights]
    assert whole == pytest.approx([2.12, 2.71, 3.47], abs=0.12)
    cut = [matrix_alpha(weight, AlphaOptions(windows=3)) for weight in weights]
    assert max(cut) - min(cut) < 0.1


def test_a_matrix_of_one_direction_and_one_of_none_are_finite():
    one = jnp.outer(jnp.arange(1.0, 9.0), jnp.ones(8))
    for weight in (one, jnp.zeros((8, 8)), jnp.eye(8)):
        for tail in ("middle", "peak"):
            assert np.isfinite(matrix_alpha(weight, AlphaOptions(tail=tail)))


@pytest.mark.parametrize("tail", ["middle", "peak"])
def test_a_block_of_heavy_tails_is_first(tail):
    config = llama_config(3)
    params = dict(random_params(config, dtype=jnp.float32))
    rng, block = np.random.default_rng(0), params["block_1"]
    for part, matrices in (("attention", block["attention"]), ("mlp", block["mlp"])):
        planted = {}
        for name, leaf in matrices.items():
            K, N = leaf["kernel"].shape
            u, v = (np.linalg.qr(rng.standard_normal((n, min(K, N))))[0] for n in (K, N))
            values = np.sqrt(rng.pareto(0.8, min(K, N)) + 1)
            planted[name] = {"kernel": jnp.asarray((u * values) @ v.T, jnp.float32)}
        block = {**block, part: planted}
    params["block_1"] = block
    assert score(InMemory(config, params), "alpha", options={"tail": tail}).ranking()[0] == "block_1"


def test_windows_below_none_are_refused():
    with pytest.raises(UserError, match=r"^windows: -1; write 0 for whole matrices"):
        METRICS.options("alpha", {"windows": -1})
