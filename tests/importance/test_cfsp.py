"""CFSP's coarse importance: angles of known pairs, float64, and what the sigmoid of a z-score is."""

import itertools

import by_hand
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.cfsp import angle, sigmoid, standardized
from lq.models.source import InMemory

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 90, (5, 16), np.int32), "random", "random")
BLOCKS = 4


@pytest.fixture(scope="module")
def source():
    config = llama_config(BLOCKS)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.mark.parametrize("c", [0.0, 1e-4, 0.5, 3.0])
def test_a_step_at_right_angles(c):
    """h + c |h| v with v of length 1 and at right angles to h: the angle is arctan c."""
    h, v = np.zeros((7, 64)), np.zeros((7, 64))
    h[:, :32] = np.random.default_rng(0).standard_normal((7, 32))
    v[:, 32:] = np.random.default_rng(1).standard_normal((7, 32))
    v *= np.linalg.norm(h, axis=-1, keepdims=True) / np.linalg.norm(v, axis=-1, keepdims=True)
    got = angle(jnp.asarray(h, jnp.float32), jnp.asarray(h + c * v, jnp.float32))
    # Unit vectors are known to a few 2^-24 in every element, and so is the angle, however small it is.
    np.testing.assert_allclose(got, np.arctan(c) / np.pi, rtol=1e-6, atol=8 * 2.0**-24)


def test_angles_at_the_ends():
    h = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)), jnp.float32)
    assert np.asarray(angle(h, h)).tolist() == [0.0] * 5, "the very same"
    np.testing.assert_allclose(angle(h, -2 * h), 1.0, atol=1e-6)
    np.testing.assert_allclose(angle(h, 0 * h), 0.5, atol=1e-6)


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_scores_are_those_of_float64(source, slope):
    h = by_hand.states(source, WINDOWS.tokens)
    pairs = list(itertools.pairwise(h))
    cosines = [(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1) for a, b in pairs]
    summed = np.array([(np.arccos(cosine) / np.pi).sum() for cosine in cosines])
    expected = 1 / (1 + np.exp(-slope * (summed - summed.mean()) / summed.std()))
    found = score(source, "cfsp", WINDOWS, {"slope": slope, "batch_size": 2})
    # States are known to about 64 * 2^-24, and so are their angles; z-scores divide by a spread of about 0.1.
    assert list(found.extra["angle"].values()) == pytest.approx(summed / WINDOWS.tokens.size, rel=1e-5)
    assert list(found.values.values()) == pytest.approx(expected, abs=1e-4)
    assert found.ranking() == [f"block_{i}" for i in np.argsort(-summed)], "the order is that of the angles"


def test_blocks_that_are_alike_are_all_in_the_middle(source):
    idle = by_hand.with_blocks(source, lambda i, block: by_hand.writing(block, 0.0))
    assert set(score(idle, "cfsp", WINDOWS).values.values()) == {0.5}


def test_the_scale():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    assert standardized(values).mean() == pytest.approx(0.0, abs=1e-15)
    assert standardized(values).std() == pytest.approx(1.0)
    np.testing.assert_allclose(standardized(7.0 * values + 3.0), standardized(values), rtol=1e-12)
    assert standardized(np.full(3, 2.0)).tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(sigmoid(np.array([-800.0, 0.0, 1.0, 800.0])), [0, 0.5, 1 / (1 + np.exp(-1)), 1])


@pytest.mark.parametrize("which", range(BLOCKS))
def test_a_block_that_writes_more_is_first(source, which):
    assert score(by_hand.planted(source, which), "cfsp", WINDOWS).ranking()[0] == f"block_{which}"


def test_a_slope_that_turns_the_order_round_is_refused():
    with pytest.raises(UserError, match=r"^slope: -1; write a number above 0, such as 1$"):
        METRICS.options("cfsp", {"slope": -1})
