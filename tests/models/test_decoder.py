"""The decoder apart from any family: parts compose, packed leaves stand in for dense ones, experts are routed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import lq.models.decoder as decoder_module
from lq.models.config import BlockKind, Experts, ModelConfig, Rope
from lq.models.context import DecodeState, context_for
from lq.models.decoder import Decoder, abstract_params, apply_block, embed, head
from lq.models.layers import MixtureOfExperts, inverse_frequencies, unboxed
from lq.models.loading import open_checkpoint
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec

CASES = ["gemma3_text", "gpt2", "llama", "opt", "phi3", "qwen2", "qwen3_moe"]


@pytest.fixture(params=CASES)
def model(request, recorded):
    checkpoint = open_checkpoint(recorded / request.param)
    return Decoder(checkpoint.config), checkpoint.params()


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 97, (2, 24)).astype(np.int32)


def test_the_example_of_the_parts_in_the_docstring_runs(model, tokens):
    """Both indented runs of the module's docstring, as they stand: one apply, and the same from the three parts."""
    decoder, params = model
    names = {"config": decoder.config, "params": params, "tokens": tokens, "context": context_for(tokens)}
    names |= {"Decoder": Decoder, "embed": embed, "apply_block": apply_block, "head": head}
    code = [line[4:] for line in decoder_module.__doc__.splitlines() if line.startswith("    ")]
    cut = next(i for i, line in enumerate(code) if line.startswith("h = embed"))
    exec("\n".join(code[:cut]), names)
    whole = names.pop("logits")
    exec("\n".join(code[cut:]), names)
    np.testing.assert_array_equal(np.asarray(names["logits"]), np.asarray(whole))


def test_parts_compose_to_the_decoder_bit_for_bit(model, tokens):
    decoder, params = model
    valid = np.ones(tokens.shape, bool)
    valid[1, :5] = False
    config, context = decoder.config, context_for(tokens, valid)
    h = embed(config, {"embed": params["embed"]}, tokens, context)
    for i, kind in enumerate(config.kinds):
        h = apply_block(config, kind, params[f"block_{i}"], h, context)
    logits = head(config, {"embed": params["embed"], "head": params["head"]}, h)
    np.testing.assert_array_equal(logits, decoder.apply({"params": params}, tokens, valid))


def test_steps_through_the_cache_equal_one_pass(model, tokens):
    decoder, params = model
    whole = decoder.apply({"params": params}, tokens)
    step = jax.jit(functools.partial(decoder.apply, method="step"))
    state = DecodeState.empty(decoder.config, batch=2, capacity=24)
    pieces = []
    for piece in np.split(tokens, [10, 11, 12, 22, 23], axis=1):
        logits, state = step({"params": params}, piece, state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-5 * float(abs(whole).max()))


def test_step_keeps_the_last_logits_only(model, tokens):
    decoder, params = model
    state = DecodeState.empty(decoder.config, batch=2, capacity=24)
    every, _ = decoder.apply({"params": params}, tokens, state, method="step")
    last, _ = decoder.apply({"params": params}, tokens, state, logits_to_keep=1, method="step")
    np.testing.assert_allclose(last, every[:, -1:], rtol=1e-5, atol=1e-6)


def test_numpy_parameters_are_as_good_as_jax_ones(model, tokens):
    decoder, params = model
    on_host = jax.tree.map(np.asarray, params)
    expected = decoder.apply({"params": params}, tokens)
    np.testing.assert_array_equal(decoder.apply({"params": on_host}, tokens), expected)


def test_packed_leaves_equal_their_dense_values(model, tokens):
    decoder, params = model
    packed, dense = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        quantized = path.endswith("kernel") or path == "embed/tokens/embedding"
        q = to_eight_bits(leaf.T if path.startswith("embed") else leaf) if quantized else leaf
        packed[path] = q
        dense[path] = q.dequantize() if quantized else leaf
        if path.startswith("embed") and quantized:
            dense[path] = dense[path].T
    run = jax.jit(lambda leaves: decoder.apply({"params": unflatten_dict(leaves, sep="/")}, tokens))
    logits, expected = run(packed), run(dense)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * float(abs(expected).max()))


def to_eight_bits(w) -> QTensor:
    """Round to nearest, symmetric, one scale per column."""
    spec = QuantSpec(bits=8, group_size=None, symmetric=True, scale_dtype="float32")
    scale = jnp.abs(w).max(-2, keepdims=True) / 127
    codes = jnp.clip(jnp.round(w / scale) + spec.zero_point, 0, spec.max_code).astype(jnp.uint32)
    return QTensor.from_codes(codes, scale, None, spec)


def test_abstract_parameters_are_those_of_init(model):
    decoder, _ = model
    boxed = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    tree = unboxed(boxed)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(decoder.config)
    )


def test_compute_dtype_is_the_given_one(recorded, tokens):
    checkpoint = open_checkpoint(recorded / "llama")
    exact = Decoder(checkpoint.config).apply({"params": checkpoint.params()}, tokens)
    rounded = Decoder(checkpoint.config, dtype=jnp.bfloat16).apply({"params": checkpoint.params()}, tokens)
    assert rounded.dtype == jnp.float32
    error = float(abs(rounded - exact).max() / abs(exact).max())
    assert 1e-3 < error < 0.2


# Mixture of experts


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_equal_a_loop_over_tokens(renormalize):
    rng = np.random.default_rng(1)
    D, F, E, K = 12, 20, 5, 3
    config = ModelConfig(
        family="mixtral",
        vocab_size=8,
        hidden_size=D,
        intermediate_size=F,
        num_heads=1,
        num_kv_heads=1,
        head_dim=D,
        max_positions=8,
        kinds=(BlockKind(routed=True),),
        query_scale=1.0,
        experts=Experts(count=E, per_token=K, intermediate_size=F, renormalize=renormalize),
    )
    x = rng.normal(size=(2, 7, D)).astype(np.float32)
    router, gate, up = (rng.normal(size=s).astype(np.float32) for s in [(D, E), (E, D, F), (E, D, F)])
    down = rng.normal(size=(E, F, D)).astype(np.float32)
    params = {"router": {"kernel": router}} | {
        f"{name}_proj": {"kernel": kernel} for name, kernel in [("gate", gate), ("up", up), ("down", down)]
    }
    y = MixtureOfExperts(config).apply({"params": params}, x)

    expected = np.zeros_like(x, np.float64)
    for at in np.ndindex(2, 7):
        token = x[at].astype(np.float64)
        probability = np.exp(token @ router)
        probability /= probability.sum()
        chosen = np.argsort(-probability)[:K]
        weight = probability[chosen] / (probability[chosen].sum() if renormalize else 1.0)
        for e, share in zip(chosen, weight, strict=True):
            z = token @ gate[e]
            expected[at] += share * ((z / (1 + np.exp(-z)) * (token @ up[e])) @ down[e])
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_experts_may_all_be_the_same_one(recorded, tokens):
    """Experts that no token chose get no rows."""
    checkpoint = open_checkpoint(recorded / "mixtral")
    params = flatten_dict(checkpoint.params(), sep="/")
    for path, leaf in params.items():
        if path.endswith("router/kernel"):
            params[path] = jnp.zeros_like(leaf)  # ties go to the first two
    logits = Decoder(checkpoint.config).apply({"params": unflatten_dict(params, sep="/")}, tokens)
    assert np.isfinite(logits).all()


# Rotary positions


def test_longrope_changes_tables_at_the_original_context():
    rope = Rope(
        rotary_dim=4, kind="longrope", original_max_positions=8, short_factor=(1.0, 2.0), long_factor=(4.0, 8.0)
    )
    plain = np.asarray(inverse_frequencies(dataclasses.replace(rope, kind="default"), 1))
    np.testing.assert_allclose(inverse_frequencies(rope, 8), plain / [1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(inverse_frequencies(rope, 9), plain / [4.0, 8.0], rtol=1e-6)


def test_padding_does_not_count_as_context():
    tokens = np.zeros((2, 9), np.int32)
    valid = np.ones((2, 9), bool)
    assert context_for(tokens, valid).length == 9
    valid[:, 0] = False
    assert context_for(tokens, valid).length == 8
