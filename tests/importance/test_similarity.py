"""How alike the stream is before and after: closed forms, and float64 on states taken from the decoder's own blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.importance import score
from lq.importance.similarity import cosine
from lq.models.context import context_for
from lq.models.decoder import apply_block, embed
from lq.models.source import InMemory

pytestmark = pytest.mark.once

TOKENS = np.random.default_rng(0).integers(1, 90, (5, 16), np.int32)
WINDOWS = Windows(TOKENS, "random", "random")


@pytest.mark.parametrize("c", [0.0, 0.5, 3.0])
def test_a_step_at_right_angles(c):
    """h + c |h| v with v of length 1 and at right angles to h: the cosine is 1 / sqrt(1 + c^2)."""
    h = np.random.default_rng(0).standard_normal((7, 32))
    v = np.random.default_rng(1).standard_normal((7, 32))
    v -= (v * h).sum(-1, keepdims=True) / (h * h).sum(-1, keepdims=True) * h
    v *= np.linalg.norm(h, axis=-1, keepdims=True) / np.linalg.norm(v, axis=-1, keepdims=True)
    got = cosine(jnp.asarray(h, jnp.float32), jnp.asarray(h + c * v, jnp.float32))
    np.testing.assert_allclose(got, 1 / np.sqrt(1 + c * c), rtol=32 * 2.0**-24)


def states(source):
    """Float64 states at the input of every block and behind the last, and behind every attention."""
    config, context = source.config, context_for(jnp.asarray(TOKENS))
    h, before, middle = embed(config, source.params(), TOKENS, context), [], []
    for index, kind in enumerate(config.kinds):
        params = source.block(index)
        part = "moe" if kind.routed else "mlp"
        silenced = {**params, part: {**params[part], "down_proj": {"kernel": 0 * params[part]["down_proj"]["kernel"]}}}
        before.append(np.asarray(h, np.float64))
        middle.append(np.asarray(apply_block(config, kind, silenced, h, context), np.float64))
        h = apply_block(config, kind, params, h, context)
    return [*before, np.asarray(h, np.float64)], middle


def turned(a, b):
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def source(request):
    config = llama_config(3) if request.param == "llama" else config_of("mixtral")
    return InMemory(config, random_params(config, dtype=jnp.float32))


def test_scores_are_those_of_float64(source):
    h, u = states(source)
    blocks, part = range(source.config.num_blocks), "moe" if source.config.kinds[0].routed else "mlp"
    expected = {f"block_{i}": 1 - turned(h[i], h[i + 1]).mean() for i in blocks}
    # 1 less a cosine of D = 64 products in float32: as far as the cosine is known.
    tolerance = {"rel": 1e-5, "abs": 64 * 2.0**-24}
    assert score(source, "block_influence", WINDOWS).values == pytest.approx(expected, **tolerance)
    lim = score(source, "lim", WINDOWS).values
    assert {unit: 1 + value for unit, value in lim.items()} == pytest.approx(expected, **tolerance)
    parts = score(source, "block_influence", WINDOWS, {"unit": "part", "batch_size": 2}).values
    for i in blocks:
        assert parts[f"block_{i}/attention"] == pytest.approx(1 - turned(h[i], u[i]).mean(), **tolerance)
        assert parts[f"block_{i}/{part}"] == pytest.approx(1 - turned(u[i], h[i + 1]).mean(), **tolerance)
    angles = {f"block_{i}": np.arccos(turned(h[i], h[i + 1])[:, -1]).mean() / np.pi for i in blocks}
    assert score(source, "angular", WINDOWS).values == pytest.approx(angles, rel=1e-4)
    added = {
        f"block_{i}": (np.linalg.norm(h[i + 1] - h[i], axis=-1) / np.linalg.norm(h[i], axis=-1)).mean() for i in blocks
    }
    assert score(source, "contribution", WINDOWS).values == pytest.approx(added, rel=1e-5)


@pytest.mark.parametrize("metric", ["block_influence", "angular", "contribution"])
@pytest.mark.parametrize("planted", [0, 2])
def test_a_block_that_writes_more_is_first(metric, planted):
    config = llama_config(3)
    params = dict(random_params(config, dtype=jnp.float32))
    for index in range(3):
        factor = 20.0 if index == planted else 0.05
        block = dict(params[f"block_{index}"])
        for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
            block[part] = {**block[part], name: {"kernel": factor * block[part][name]["kernel"]}}
        params[f"block_{index}"] = block
    assert score(InMemory(config, params), metric, WINDOWS).ranking()[0] == f"block_{planted}"
