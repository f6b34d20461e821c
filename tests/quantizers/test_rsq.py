"""Token importance: attention summed explicitly in float64 NumPy, and what weights must do to a second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import CASES, blocks_of, states
from small_models import llama_config, random_params

from lq.calibration.statistics import reduce_inputs
from lq.errors import UserError
from lq.models.context import context_for
from lq.models.layers import inverse_frequencies
from lq.quantizers import rsq
from lq.quantizers.rsq import ImportanceOptions, attention_concentration, attention_received, token_importance

pytestmark = pytest.mark.once


def numpy_attention(config, kind, params, h):
    """P `[B, H, S, S]` in float64: softmax of masked, capped, scaled products of normed, rotated queries and keys."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    B, S, _ = h.shape

    def norm(x, leaf):
        if config.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps) * (leaf["scale"] + config.norm_offset)
        return x + leaf.get("bias", 0.0)

    def heads(name, count):
        leaf = p["attention"][f"{name}_proj"]
        x = norm(np.asarray(h, np.float64), p["attention_norm"]) @ leaf["kernel"] + leaf.get("bias", 0.0)
        x = x.reshape(B, S, count, config.head_dim)
        x = norm(x, p["attention"][f"{name}_norm"]) if config.qk_norm else x
        return x if kind.rope is None else rotated(x)

    def rotated(x):
        # The model's tables are float32; their angles are rounded here as there.
        rope = kind.rope
        table = np.asarray(inverse_frequencies(rope, jnp.int32(S)), np.float32)
        angle = (np.arange(S, dtype=np.float32)[:, None] * table).astype(np.float64)[:, None]
        cos, sin = np.cos(angle) * rope.attention_factor, np.sin(angle) * rope.attention_factor
        half = rope.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    q, k = heads("q", config.num_heads), heads("k", config.num_kv_heads)
    k = np.repeat(k, config.num_heads // config.num_kv_heads, axis=2)
    scores = np.einsum("bshc,bthc->bhst", q, k) * config.query_scale
    if config.attention_softcap is not None:
        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
    distance = np.arange(S)[:, None] - np.arange(S)
    seen = (distance >= 0) & (distance < (kind.window or S))
    weights = np.exp(np.where(seen, scores, -np.inf) - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("case", CASES)
def test_attention_received_is_the_column_sum(case):
    """Grouped heads, windows, soft caps, norms of queries and keys, every rotary table; float64 beside float64."""
    with jax.enable_x64(True):
        for config, kind, params in blocks_of(case, "float64"):
            h, tokens = states(config, shape=(2, 40), dtype="float64")
            got = np.asarray(attention_received(config, kind, params, jnp.asarray(h), context_for(tokens)))
            want = numpy_attention(config, kind, params, h).sum((1, 2))
            # Cosines are float32, off by 6e-8, in scores of up to thirty; without rotation doubles agree.
            np.testing.assert_allclose(got, want, rtol=1e-10 if kind.rope is None else 1e-5)
            np.testing.assert_allclose(got.sum(1), config.num_heads * 40, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 16, 40])
def test_slices_of_queries_add_up(size, monkeypatch):
    """40 queries in slices that divide them and in slices that do not."""
    with jax.enable_x64(True):
        config, kind, params = next(iter(blocks_of("mistral", "float64")))
        h, tokens = states(config, shape=(2, 40), dtype="float64")
        whole = attention_received(config, kind, params, jnp.asarray(h), context_for(tokens))
        monkeypatch.setattr(rsq, "SLICE", size)
        sliced = attention_received(config, kind, params, jnp.asarray(h), context_for(tokens))
        np.testing.assert_allclose(sliced, whole, rtol=1e-12)


def test_scores_of_a_whole_sequence_are_never_there():
    """A sequence of 2048: its scores would be 64 MB, the compiled program holds a quarter of that beside its inputs."""
    config = llama_config(1)
    params = random_params(config, dtype=jnp.float32)["block_0"]
    h, tokens = states(config, shape=(1, 2048))
    lowered = token_importance.lower(config, config.kinds[0], params, h, tokens, ImportanceOptions())
    assert lowered.compile().memory_analysis().temp_size_in_bytes < config.num_heads * 2048 * 2048 * 4 / 4


def test_concentration_is_stretched_and_has_mean_one():
    config, kind, params = next(iter(blocks_of("llama", "float32")))
    h, tokens = states(config, shape=(3, 40))
    received = numpy_attention(config, kind, params, h).sum((1, 2))
    low, high = received.min(1, keepdims=True), received.max(1, keepdims=True)
    want = 0.05 + 0.95 * (received - low) / (high - low)
    want /= want.mean(1, keepdims=True)
    got = np.asarray(attention_concentration(config, kind, params, jnp.asarray(h), context_for(tokens), 0.05))
    assert got.dtype == np.float32
    # Sums of 160 float32 probabilities, in scores of up to thirty; relative to the largest.
    np.testing.assert_allclose(got, want, atol=1e-4 * want.max())
    np.testing.assert_allclose(got.mean(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(got.min(1) / got.max(1), 0.05, rtol=1e-5)
    options = ImportanceOptions(r_min=0.05)
    np.testing.assert_allclose(token_importance(config, kind, params, h, tokens, options), got, rtol=1e-4)


def test_a_least_importance_of_one_is_none_at_all():
    config, kind, params = next(iter(blocks_of("llama", "float32")))
    h, tokens = states(config)
    for options in (ImportanceOptions(r_min=1.0), ImportanceOptions(importance="uniform")):
        np.testing.assert_array_equal(token_importance(config, kind, params, h, tokens, options), np.ones((2, 12)))
    alike = np.broadcast_to(h[:, :1], h.shape)  # tokens of equal norm
    options = ImportanceOptions(importance="actnorm", r_min=0.0)
    np.testing.assert_array_equal(token_importance(config, kind, params, alike, tokens, options), np.ones((2, 12)))


def test_importance_by_norm():
    config, kind, params = next(iter(blocks_of("llama", "float32")))
    h, tokens = states(config)
    norms = np.linalg.norm(h.astype(np.float64), axis=-1)
    want = (norms - norms.min(1, keepdims=True)) / np.ptp(norms, axis=1, keepdims=True) * 0.8 + 0.2
    options = ImportanceOptions(importance="actnorm", r_min=0.2)
    got = token_importance(config, kind, params, h, tokens, options)
    np.testing.assert_allclose(got, want / want.mean(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("first", "kept"), [(None, 5), (10, 10), (99, 40)])
def test_the_first_tokens_alone_give_their_own_second_moment(first, kept):
    config, kind, params = next(iter(blocks_of("llama", "float32")))
    h, tokens = states(config, shape=(2, 40))
    options = ImportanceOptions(importance="firstn", first=first)
    weights = token_importance(config, kind, params, h, tokens, options)
    np.testing.assert_allclose(weights[:, :kept], 40 / kept, rtol=1e-6)
    np.testing.assert_array_equal(weights[:, kept:], 0.0)
    needs = frozenset({"hessian"})
    weighed = reduce_inputs(h.reshape(-1, h.shape[-1]), needs, jnp.ravel(weights))
    subset = reduce_inputs(jnp.asarray(h[:, :kept].reshape(-1, h.shape[-1])), needs)
    assert float(weighed.tokens) == pytest.approx(80, rel=1e-6)
    want = np.asarray(subset.hessian) * 40 / kept
    np.testing.assert_allclose(weighed.hessian, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r_min": -0.1}, "rsq: option r_min: -0.1; write a number from 0 to 1"),
        ({"r_min": 1.5}, "rsq: option r_min: 1.5; write a number from 0 to 1"),
        ({"first": 0}, "rsq: option first: 0; write 1 or more tokens, or null"),
        ({"first": 9}, "rsq: option first: 9, but importance is attncon, not firstn; leave it out"),
        (
            {"importance": "uniform", "r_min": 0.1},
            "rsq: option r_min: 0.1, but importance uniform is not stretched to it; leave it out",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(given, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        ImportanceOptions(**given)
