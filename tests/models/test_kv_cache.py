"""The quantized key/value cache in a model: attention over it, decoding with it, and what it costs."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lq.models.layers as layers
from lq.assets import ASSETS
from lq.calibration.data import evaluation_windows
from lq.errors import UserError
from lq.models.context import Context, DecodeState
from lq.models.decoder import Decoder
from lq.models.generate import _run, cache_nbytes, generate
from lq.models.loading import load_tokenizer, open_checkpoint
from lq_kernels.kv_cache import KVCacheSpec, QuantizedKVCache

pytestmark = pytest.mark.once

G = 32


def to_bfloat16(x, up):
    """The next bfloat16 of float32 `x`, upwards or downwards, as float32."""
    nearest = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    beyond = nearest < x if up else nearest > x
    next_one = jnp.nextafter(nearest.astype(jnp.bfloat16), jnp.bfloat16(jnp.inf if up else -jnp.inf))
    return jnp.where(beyond, next_one.astype(jnp.float32), nearest)


def fake_quantized(x, axis, bits):
    """`x` rounded within its groups along `axis` as `lq_kernels.kv_cache` defines it; nothing is packed."""
    zero = to_bfloat16(x.min(axis, keepdims=True), up=False)
    scale = to_bfloat16((x.max(axis, keepdims=True) - zero) / (2**bits - 1), up=True)
    return jnp.clip(jnp.round((x - zero) / scale), 0, 2**bits - 1) * scale + zero


def kivi(k, v, packed, bits):
    """Dense keys and values `[B, T, H, C]` with the first `packed` tokens rounded: keys per channel in groups of G
    tokens, values per token in groups of G channels, or the whole head where G does not divide it."""
    B, T, H, C = k.shape
    pad = [(0, 0), (0, -T % G), (0, 0), (0, 0)]
    keys = fake_quantized(jnp.pad(k, pad).reshape(B, -1, G, H, C), 2, bits).reshape(B, -1, H, C)[:, :T]
    values = fake_quantized(v.reshape(B, T, H, -1, C if C % G else G), -1, bits).reshape(v.shape)
    old = (jnp.arange(T) < packed)[:, None, None]
    return jnp.where(old, keys, k), jnp.where(old, values, v)


def packed_tokens(written, residual, capacity):
    return np.maximum(-(-(written - min(residual, capacity)) // G), 0) * G


@flax.struct.dataclass
class FakeQuantized:
    """A dense cache that gives rounded what `QuantizedKVCache` would have packed before the newest tokens came."""

    raw_k: jax.Array
    raw_v: jax.Array
    packed: jax.Array
    bits: int = flax.struct.field(pytree_node=False)
    residual: int = flax.struct.field(pytree_node=False)

    def write(self, k, v, start):
        capacity = self.raw_k.shape[1]
        beyond = jnp.maximum(start - min(self.residual, capacity), 0)
        return self.replace(
            raw_k=jax.lax.dynamic_update_slice(self.raw_k, k, (0, start, 0, 0)),
            raw_v=jax.lax.dynamic_update_slice(self.raw_v, v, (0, start, 0, 0)),
            packed=(beyond + G - 1) // G * G,
        )

    k = property(lambda self: kivi(self.raw_k, self.raw_v, self.packed, self.bits)[0])
    v = property(lambda self: kivi(self.raw_k, self.raw_v, self.packed, self.bits)[1])


def long_model(recorded, case):
    """A recorded model with room for long texts, where its positions are not a learned table."""
    checkpoint = open_checkpoint(recorded / case)
    config = checkpoint.config
    if config.learned_position_offset is None:
        config = dataclasses.replace(config, max_positions=512)
    return Decoder(config), checkpoint.params()


def random_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(1, 97, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("decoder", "piece"))
def fed(decoder, params, tokens, state, piece):
    """Logits of every position, the text fed `piece` tokens at a time by a loop on the device; and the last state."""
    batch, length = tokens.shape

    def step(state, piece):
        logits, state = decoder.apply({"params": params}, piece, state, method="step")
        return state, logits

    pieces = tokens.reshape(batch, length // piece, piece).swapaxes(0, 1)
    state, logits = jax.lax.scan(step, state, pieces)
    return logits.swapaxes(0, 1).reshape(batch, length, -1), state


# Attention


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("written", "new", "residual", "window", "softcap"),
    [(400, 1, 128, None, None), (390, 7, 64, None, 30.0), (400, 1, 32, 150, None), (100, 3, 128, None, None)],
)
@pytest.mark.parametrize("chunk", [128, 512])
def test_attention_equals_exact_attention_over_rounded_keys_and_values(
    bits, written, new, residual, window, softcap, chunk, monkeypatch
):
    """In float64, with ragged rows and grouped heads. The packed part is read in one chunk or in several; of the first
    case's ten groups the last four at a time overlap those before."""
    monkeypatch.setattr(layers, "CHUNK", chunk)
    B, H, kv_heads, C, T = 2, 6, 2, 64, 420
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, B, written + new, kv_heads, C)).astype(np.float32)
    k[..., 3] *= 8
    q = rng.standard_normal((B, new, H, C)).astype(np.float32)
    valid = np.arange(T)[None] >= np.array([[0], [70]])  # the second row has 70 tokens of padding
    valid &= np.arange(T)[None] < written + new
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)

    cache = QuantizedKVCache.empty(KVCacheSpec(bits=bits, residual=residual), B, T, kv_heads, C, jnp.float32)
    cache = jax.jit(QuantizedKVCache.append)(cache, k[:, :written], v[:, :written], jnp.int32(0), valid)
    context = Context(positions[:, written : written + new], positions, valid, jnp.int32(written), jnp.int32(T))
    args = [jnp.asarray(x) for x in (q, k[:, written:], v[:, written:])]
    attend = jax.jit(lambda *arrays: layers.attend_quantized(*arrays, window, 0.2, softcap))  # its own trace each time
    got = attend(*args, cache, context)

    packed = packed_tokens(written, residual, T)
    assert packed >= (256 if residual < 128 or written > 300 else 0)
    # Padding shares no scale with tokens: round with it replaced by the group's first token.
    k[1, 64:70] = k[1, 70]
    k, v = (np.asarray(x, np.float64) for x in kivi(jnp.asarray(k), jnp.asarray(v), packed, bits))
    for row in range(B):
        for i in range(new):
            seen = valid[row] & (positions[row] <= positions[row, written + i])
            seen &= np.arange(T) <= written + i
            if window is not None:
                seen &= positions[row, written + i] - positions[row] < window
            for head in range(H):
                keys, values = (x[row, seen[: written + new], head // (H // kv_heads)] for x in (k, v))
                scores = 0.2 * keys @ q[row, i, head].astype(np.float64)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                expected = weights @ values / weights.sum()
                np.testing.assert_allclose(got[row, i, head], expected, atol=2e-5)


# Decoding


@pytest.mark.long
@pytest.mark.parametrize(("case", "bits"), [("llama", 4), ("gemma3_text", 4), ("gpt2", 8), ("qwen3_moe", 4)])
def test_decoding_equals_a_dense_cache_of_rounded_numbers(case, bits, recorded):
    """Token by token past several groups, for sliding windows, learned positions and routed blocks too."""
    decoder, params = long_model(recorded, case)
    tokens, spec = random_tokens(2, 128), KVCacheSpec(bits=bits, residual=G)
    state = DecodeState.empty(decoder.config, 2, 128, quantized=spec)
    dense = DecodeState.empty(decoder.config, 2, 128)
    fake = tuple(FakeQuantized(c.k, c.v, jnp.int32(0), bits=bits, residual=G) for c in dense.caches)
    logits, _ = fed(decoder, params, tokens, state, 1)
    expected, _ = fed(decoder, params, tokens, dataclasses.replace(dense, caches=fake), 1)
    exact, _ = fed(decoder, params, tokens, dense, 1)
    largest = float(abs(exact).max())
    np.testing.assert_allclose(logits[:, : G + 1], exact[:, : G + 1], atol=2e-5 * largest)
    effect, off = (float(jnp.sqrt(jnp.square(x - expected).mean())) for x in (exact, logits))
    assert effect > 5e-4 * largest
    assert off <= 0.2 * effect  # equal to 1e-5 but for numbers half way between two levels, rounded to either


@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_short_of_the_residual_it_is_the_dense_cache(case, recorded):
    """However the text is cut, and though the packed part has room."""
    decoder, params = long_model(recorded, case)
    tokens = random_tokens(2, 120)
    exact, _ = fed(decoder, params, tokens, DecodeState.empty(decoder.config, 2, 300), 120)
    for piece in (120, 15):
        state = DecodeState.empty(decoder.config, 2, 300, quantized=KVCacheSpec(bits=4))
        assert state.caches[0].groups == 6
        logits, _ = fed(decoder, params, tokens, state, piece)
        np.testing.assert_allclose(logits, exact, atol=2e-5 * float(abs(exact).max()))


def test_decoding_equals_prefill_in_what_the_first_block_caches(recorded):
    """Its keys and values depend on no attention. Later blocks differ: a token of a prompt sees all of the prompt in
    full precision, as in KIVI, a decoded one sees rounded what is past the residual."""
    decoder, params = long_model(recorded, "llama")
    tokens, spec = random_tokens(2, 200), KVCacheSpec(bits=4)
    (at_once, whole), (one_by_one, steps) = (
        fed(decoder, params, tokens, DecodeState.empty(decoder.config, 2, 200, quantized=spec), n) for n in (200, 1)
    )
    first = lambda state: jax.tree.leaves(state.caches[0])  # noqa: E731
    for a, b in zip(first(whole), first(steps), strict=True):
        a, b = (np.asarray(x, np.uint32 if x.dtype == jnp.uint32 else np.float32) for x in (a, b))
        if a.dtype == np.uint32:
            assert (a != b).mean() < 1e-3  # the matrix products of the two may differ in their last bits
        else:
            np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5)
    exact = decoder.apply({"params": params}, tokens)
    largest = float(abs(exact).max())
    np.testing.assert_allclose(at_once, exact, atol=2e-5 * largest)
    assert 0 < float(abs(one_by_one - exact)[:, 129:].max()) < 0.5 * largest


# Generation


PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (230, 5, 130)]


@pytest.mark.long
def test_batch_equals_one_by_one(recorded):
    """Rows that differ in padding have their tokens in the same groups: prompts are padded to a multiple of G."""
    model = long_model(recorded, "llama")
    options = {"max_new_tokens": 40, "kv_bits": 4, "stop_ids": ()}
    together = generate(*model, PROMPTS, **options)
    assert together == [generate(*model, [prompt], **options)[0] for prompt in PROMPTS]
    assert together != generate(*model, PROMPTS, **(options | {"kv_bits": 16}))


def test_length_shares_one_compilation(recorded):
    model = long_model(recorded, "llama")
    generate(*model, [[5] * 200], max_new_tokens=33, kv_bits=8)
    compiled = _run._cache_size()
    generate(*model, [[6] * 221], max_new_tokens=60, kv_bits=8)
    assert _run._cache_size() == compiled


def test_low_precision(recorded):
    decoder, params = long_model(recorded, "llama")
    rows = generate(Decoder(decoder.config, jnp.bfloat16), params, PROMPTS, max_new_tokens=8, kv_bits=4, stop_ids=())
    assert [len(row) for row in rows] == [8, 8, 8]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_are_those_of_the_formula(recorded, dtype):
    decoder, params = long_model(recorded, "llama")
    decoder, config = Decoder(decoder.config, dtype), decoder.config
    bytes_of = functools.partial(cache_nbytes, decoder, params, PROMPTS, max_new_tokens=40)
    batch, capacity, blocks = len(PROMPTS), 256 + 64, config.num_blocks
    size = jnp.dtype(dtype).itemsize
    dense = 2 * batch * capacity * config.num_kv_heads * config.head_dim * size * blocks
    assert bytes_of() == dense
    for bits in (4, 8):
        spec = KVCacheSpec(bits=bits)
        expected = blocks * spec.nbytes(batch, capacity, config.num_kv_heads, config.head_dim, dtype)
        assert bytes_of(kv_bits=bits) == expected
        state = DecodeState.empty(config, batch, capacity, dtype, quantized=spec)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches)) == expected
        assert expected < dense


@pytest.mark.parametrize("bits", [0, 2, 5, 32])
def test_other_widths_are_a_mistake(recorded, bits):
    with pytest.raises(UserError, match=f"^kv_bits: {bits}; write 4 or 8, or 16 for a cache that is not quantized$"):
        generate(*long_model(recorded, "llama"), [[1]], max_new_tokens=4, kv_bits=bits)


# The shipped model


@pytest.mark.long
def test_what_the_cache_costs_the_shipped_model():
    """Teacher-forced over shipped text, in pieces of 32 tokens. Measured token by token over 24 windows of 512: KL to
    the dense cache 9.0e-7 nats at 8 bits, 2.0e-4 at 4; perplexity 26.7499 dense, 26.7499 at 8 bits, 26.7569 at 4."""
    checkpoint = open_checkpoint(ASSETS / "standin")
    decoder, params = Decoder(checkpoint.config, jnp.float32), checkpoint.params()
    text = str(ASSETS / "texts" / "evaluation.txt")
    tokens = np.asarray(evaluation_windows(load_tokenizer(checkpoint.path), text, 512, limit=2).tokens)
    exact = np.asarray(jax.nn.log_softmax(decoder.apply({"params": params}, tokens)), np.float64)

    def with_cache(bits):
        state = DecodeState.empty(decoder.config, 2, 512, quantized=KVCacheSpec(bits=bits))
        logits, _ = fed(decoder, params, tokens, state, 32)
        return np.asarray(jax.nn.log_softmax(logits), np.float64)

    eight, four = with_cache(8), with_cache(4)
    divergence = lambda other: float((np.exp(exact) * (exact - other)).sum(-1).mean())  # noqa: E731
    assert divergence(eight) < 5e-6
    assert 1e-5 < divergence(four) < 1e-3
    assert (eight.argmax(-1) == exact.argmax(-1)).mean() > 0.998
    assert (four.argmax(-1) == exact.argmax(-1)).mean() > 0.98
