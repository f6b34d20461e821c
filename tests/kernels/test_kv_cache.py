"""The quantized key/value cache, against KIVI's rounding written in NumPy and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq_kernels.kv_cache import KVCacheSpec, QuantizedKVCache, quantize_keys, quantize_values

pytestmark = pytest.mark.once

B, H, C, G = 2, 3, 64, 32
FLOAT32 = np.finfo(np.float32).eps


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens_of(length, seed=0, channels=C):
    """Keys and values `[B, length, H, channels]`; two key channels are large and off centre, as KIVI found them."""
    k, v = normal(2, B, length, H, channels, seed=seed)
    k[..., 3] = 10 * k[..., 3] - 40
    k[..., 5] = 0.1 * k[..., 5] + 25
    return k, v


def to_bfloat16(x, towards):
    """The next bfloat16 of float32 `x` in the direction `towards`: -inf or inf."""
    nearest = x.astype(jnp.bfloat16)
    beyond = nearest.astype(np.float64) > x if towards < 0 else nearest.astype(np.float64) < x
    return np.where(beyond, np.nextafter(nearest, nearest.dtype.type(towards)), nearest).astype(np.float64)


def rounded(x, axis, bits):
    """Codes, scale and zero of groups along `axis`, in float64, by the definition in `lq_kernels.kv_cache`."""
    x = x.astype(np.float64)
    zero = to_bfloat16(x.min(axis, keepdims=True).astype(np.float32), -np.inf)
    step = (x.max(axis, keepdims=True) - zero) / (2**bits - 1)
    scale = to_bfloat16(np.maximum(step, float(jnp.finfo(jnp.bfloat16).tiny)).astype(np.float32), np.inf)
    return np.clip(np.rint((x - zero) / scale), 0, 2**bits - 1), scale, zero


def dequantized_keys(k, bits, group=G):
    """KIVI's keys: groups of `group` tokens for each channel. `k [B, N * group, H, C]`."""
    codes, scale, zero = rounded(k.reshape(B, -1, group, *k.shape[2:]), 2, bits)
    return (codes * scale + zero).reshape(k.shape), np.broadcast_to(scale, codes.shape).reshape(k.shape)


def dequantized_values(v, bits, group=G):
    """KIVI's values: groups of `group` channels for each token."""
    codes, scale, zero = rounded(v.reshape(*v.shape[:-1], -1, group), -1, bits)
    return (codes * scale + zero).reshape(v.shape), np.broadcast_to(scale, codes.shape).reshape(v.shape)


def contents(cache, written):
    """What the cache says of the first `written` tokens, `[B, written, H, C]` each: packed part, then ring."""
    packed = int(cache.quantized(jnp.int32(written)))
    slots = np.asarray(cache.ring_slots(jnp.int32(written)))
    k, v = np.zeros((2, B, written, H, cache.recent_k.shape[-1]))
    if packed:
        k[:, :packed], v[:, :packed] = (
            np.asarray(x) for x in cache.read(0, packed // cache.spec.group_size, "float32")
        )
    for at, slot in enumerate(slots):
        if slot < cache.capacity:
            k[:, slot], v[:, slot] = cache.recent_k[:, at], cache.recent_v[:, at]
    assert sorted(slot for slot in slots if slot < cache.capacity) == list(range(packed, written))
    return k, v


@functools.partial(jax.jit, static_argnames="piece")
def filled(cache, k, v, written, valid, piece):
    """The cache after k, v in pieces of `piece` tokens, by a loop on the device."""
    count = k.shape[1] // piece

    def step(i, cache):
        cut = [jax.lax.dynamic_slice_in_dim(x, i * piece, piece, axis=1) for x in (k, v)]
        return cache.append(*cut, written + i * piece, valid)

    return jax.lax.fori_loop(0, count, step, cache)


def cache_of(k, v, bits, capacity=None, piece=None, valid=None, dtype=jnp.float32, **spec):
    length, capacity = k.shape[1], capacity or k.shape[1]
    cache = QuantizedKVCache.empty(KVCacheSpec(bits=bits, **spec), B, capacity, H, k.shape[-1], dtype)
    valid = np.ones((B, capacity), bool) if valid is None else valid
    return filled(cache, k, v, jnp.int32(0), valid, piece or length)


# Rounding


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_are_rounded_per_channel_and_values_per_token(bits):
    k, v = tokens_of(2 * G)
    spec = KVCacheSpec(bits=bits)
    grouped = (B, 2, G, H, C)
    keys = quantize_keys(k.reshape(grouped), np.ones(grouped[:3], bool), spec)
    values = quantize_values(v.reshape(grouped), spec)
    for got, (expected, scale), x in [
        (keys.dequantize(spec), dequantized_keys(k, bits), k),
        (values.dequantize(spec), dequantized_values(v, bits), v),
    ]:
        got, steps = np.asarray(got, np.float64), 4 * FLOAT32 * np.abs(x).max()
        # A value half way between two levels may take the other one in float32: then it is one scale off, once.
        off = np.abs(got - expected) > steps
        assert off.mean() < 1e-3
        assert (np.abs(got - expected) <= steps + scale * off).all()
        assert (np.abs(got - x) <= scale / 2 + steps).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(-1e4, 1e4), st.floats(0, 1e3), st.integers(0, 2**32 - 1))
def test_the_error_is_at_most_half_a_stored_scale(bits, centre, spread, seed):
    x = (centre + spread * normal(1, 1, G, 1, C, seed=seed)).astype(np.float32)
    spec = KVCacheSpec(bits=bits)
    for packed, axis in [(quantize_keys(x, np.ones((1, 1, G), bool), spec), 2), (quantize_values(x, spec), -1)]:
        half = np.repeat(np.asarray(packed.scales, np.float64), C // packed.scales.shape[-1], axis=-1) / 2
        error = np.abs(np.asarray(packed.dequantize(spec), np.float64).reshape(x.shape) - x)
        assert (error <= half + 4 * FLOAT32 * np.abs(x).max() + 1e-37).all()  # numbers below 1e-38 count as 0
        # and the stored scale is that of the group's own range, but for one bfloat16 step of each end
        run = x if axis == 2 else x.reshape(1, 1, G, 1, -1, 32)
        low, high = (np.asarray(end(run, axis=axis), np.float64) for end in (np.min, np.max))
        widest = (high - low + 2**-7 * np.abs(low)) / (2**bits - 1) * (1 + 2**-7)
        assert (np.asarray(packed.scales, np.float64).reshape(low.shape) <= widest + 1e-37).all()


def test_a_group_of_equal_values_comes_back():
    x = np.full((1, 1, G, H, C), 0.7109375, np.float32)  # a bfloat16
    spec = KVCacheSpec(bits=4)
    for packed in (quantize_keys(x, np.ones((1, 1, G), bool), spec), quantize_values(x, spec)):
        np.testing.assert_array_equal(packed.dequantize(spec), x.reshape(1, G, H, C))


def test_a_large_key_channel_does_not_coarsen_the_others():
    k = normal(1, 1, G, 1, C)
    large = k.copy()
    large[..., 7] *= 1000
    spec, real, others = KVCacheSpec(bits=4), np.ones((1, 1, G), bool), np.arange(C) != 7
    plain, beside = (np.asarray(quantize_keys(x, real, spec).dequantize(spec))[..., others] for x in (k, large))
    np.testing.assert_array_equal(plain, beside)


def test_padding_does_not_widen_a_group():
    k = normal(1, 1, G, H, C)
    valid = np.arange(G)[None, None] >= 11
    spoiled = np.where(valid[..., None, None], k, 1e6)
    alone = np.where(valid[..., None, None], k, k[:, :, 11:12])
    spec = KVCacheSpec(bits=4)
    got, expected = quantize_keys(spoiled, valid, spec), quantize_keys(alone, np.ones_like(valid), spec)
    np.testing.assert_array_equal(got.scales, expected.scales)
    np.testing.assert_array_equal(got.dequantize(spec)[:, 11:], expected.dequantize(spec)[:, 11:])


def test_words_are_little_endian_along_tokens():
    """One channel whose codes are known: 0, 1, ... 15, 0, 1, ..., with scale 1 and zero 0."""
    k = np.tile(np.arange(16, dtype=np.float32), 2).reshape(1, 1, G, 1, 1)
    packed = quantize_keys(k, np.ones((1, 1, G), bool), KVCacheSpec(bits=4))
    assert float(packed.scales[0, 0, 0, 0, 0]) == 1
    np.testing.assert_array_equal(packed.planes[0].ravel(), [0x76543210, 0xFEDCBA98] * 2)


# The packed part and the ring


@pytest.mark.long
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("length", "residual"), [(300, 128), (129, 128), (128, 128), (65, 32), (97, 40), (20, 32)])
def test_oldest_tokens_are_rounded_and_newest_are_exact(bits, length, residual):
    k, v = tokens_of(length)
    cache = cache_of(k, v, bits, capacity=320, residual=residual)
    packed = int(cache.quantized(jnp.int32(length)))
    assert packed % G == 0
    assert packed == 0 if length <= residual else residual - G < length - packed <= residual
    for got, x, reference in zip(contents(cache, length), (k, v), (dequantized_keys, dequantized_values), strict=True):
        np.testing.assert_array_equal(got[:, packed:], x[:, packed:])
        if packed:
            expected, scale = reference(x[:, :packed], bits)
            off = np.abs(got[:, :packed] - expected) > 1e-5 * np.abs(x).max()
            assert off.mean() < 1e-3
            assert (np.abs(got[:, :packed] - x[:, :packed]) <= scale / 2 + 4 * FLOAT32 * np.abs(x).max()).all()


@pytest.mark.long
@pytest.mark.parametrize("residual", [32, 50, 128])
def test_how_the_text_is_cut_into_calls_changes_no_bit(residual):
    k, v = tokens_of(300)
    whole = contents(cache_of(k, v, 4, capacity=320, residual=residual), 300)
    for piece in (1, 3, 60, 100):
        pieces = cache_of(k, v, 4, piece=piece, capacity=320, residual=residual)
        for a, b in zip(contents(pieces, 300), whole, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_whole_capacity_can_be_written():
    """Past the last whole group too; the packed part has room for every group that leaves the ring."""
    for capacity in (129, 160, 161):
        k, v = tokens_of(capacity)
        whole, steps = cache_of(k, v, 8), cache_of(k, v, 8, piece=1)
        for a, b, x in zip(contents(whole, capacity), contents(steps, capacity), (k, v), strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.abs(a - x).max() < 0.2


def test_a_row_does_not_depend_on_whole_groups_of_padding_before_it():
    k, v = tokens_of(200)
    padded = [np.concatenate([1e5 + normal(B, G, H, C, seed=9), x], axis=1) for x in (k, v)]
    valid = np.arange(232)[None].repeat(B, 0) >= G
    alone, behind = cache_of(k, v, 4), cache_of(*padded, 4, valid=valid)
    for a, b in zip(contents(alone, 200), contents(behind, 232), strict=True):
        np.testing.assert_array_equal(a, b[:, G:])


def test_head_width_that_is_no_multiple_of_the_group_shares_one_scale():
    k, v = tokens_of(200, channels=48)
    cache = cache_of(k, v, 8)
    assert cache.values.scales.shape[-1] == 1
    expected, _ = dequantized_values(v[:, :96], 8, group=48)
    np.testing.assert_allclose(contents(cache, 200)[1][:, :96], expected, atol=1.01 * 8 / 255)


def test_not_a_number_stays_in_its_row():
    k, v = tokens_of(200)
    k[0, 5], v[0, 5] = np.nan, np.nan
    cache = cache_of(k, v, 4)
    k, v = contents(cache, 200)
    assert np.isnan(k[0, :G]).all()
    assert np.isnan(v[0, 5]).all()
    for rest in (k[0, G:], v[0, :5], v[0, 6:], k[1], v[1]):
        assert np.isfinite(rest).all()


# Memory


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize(("capacity", "channels"), [(64, 64), (129, 64), (1000, 48), (1024, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_formula(bits, capacity, channels, dtype):
    spec = KVCacheSpec(bits=bits)
    cache = QuantizedKVCache.empty(spec, B, capacity, H, channels, dtype)
    assert spec.nbytes(B, capacity, H, channels, dtype) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_value_costs_a_bit_more_than_its_code(bits):
    """Scale and zero of 16 bits each to 32 values: 5 bits at 4, 9 at 8."""
    cache = QuantizedKVCache.empty(KVCacheSpec(bits=bits), B, 1024 + 128, H, 128, jnp.bfloat16)
    values = B * 1024 * H * 128
    for part in (cache.keys, cache.values):
        assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(part)) == (bits + 1) * values
    ring = cache.recent_k.nbytes + cache.recent_v.nbytes
    assert ring == 2 * B * 128 * H * 128 * 2


# Mistakes


@pytest.mark.parametrize(
    ("options", "says"), [({"bits": 9}, "1 to 8 bits"), ({"bits": 4, "residual": 31}, "31 tokens")]
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        KVCacheSpec(**options)
