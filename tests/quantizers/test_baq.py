"""BAQ: widths against closed forms and brute force, codes against the sweep in float64, sizes, and what it gains."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_layers import (
    codes_in_float64,
    correlated_inputs,
    hessian_stats,
    output_error_float64,
    per_channel,
    random_weight,
)

from lq.errors import UserError
from lq.numerics.segmented import SegmentedQTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.baq import (
    BAQOptions,
    allocate_widths,
    baq_segments,
    channel_losses,
)
from lq.quantizers.gptq import GPTQOptions, factorize, gptq
from lq.quantizers.runs import sweep_runs

pytestmark = pytest.mark.once

K, N = 512, 64


def layer(spread=1.0, seed=0):
    inputs = correlated_inputs(1500, K, seed, spread)
    return random_weight(K, N, seed=seed + 1), inputs, hessian_stats(inputs)


def mixed(bits=3, group_size=64, symmetric=False):
    return QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, mixed=True)


def whole(permutation, segments):
    """Permutation, codes, scales and zeros of all segments together, and the width of every run."""
    codes, scales, zeros = (
        None if parts[0] is None else np.concatenate([np.asarray(part) for part in parts])
        for parts in zip(*(segment[1:] for segment in segments), strict=True)
    )
    widths = [bits for bits, of_segment, *_ in segments for _ in range(len(of_segment) // 128)]
    return np.asarray(permutation), codes, scales, zeros, widths


# Widths


def test_widths_by_hand():
    """c = (1, 4, 16) at 2 bits: 1, 2 and 3 bits lose 1/4 each, 0.75 in all; 2 bits each lose 21/16."""
    np.testing.assert_array_equal(allocate_widths(np.asarray([1.0, 4.0, 16.0]), 2, 1, 8), [1, 2, 3])


@pytest.mark.parametrize("slope", [1.6, 2.0])
def test_equal_losses_get_equal_widths(slope):
    np.testing.assert_array_equal(allocate_widths(np.full(7, 3.3), 3, 1, 8, slope), [3] * 7)


def test_channels_that_lose_nothing_get_the_least_bits():
    np.testing.assert_array_equal(allocate_widths(np.asarray([0.0, 1.0, 1.0, 0.0]), 3, 1, 8), [1, 5, 5, 1])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("bits", "low", "high", "slope"), [(2, 1, 4, 2.0), (3, 1, 8, 1.6), (4, 3, 6, 1.95)])
def test_whole_widths_are_the_best_of_all(seed, bits, low, high, slope):
    losses = np.exp(1.5 * np.random.default_rng(seed).standard_normal(5))
    total = lambda widths: (losses * 2.0 ** (-slope * (np.asarray(widths) - bits))).sum()  # noqa: E731
    widths = allocate_widths(losses, bits, low, high, slope)
    assert widths.sum() == 5 * bits
    assert (low <= widths).all()
    assert (widths <= high).all()
    every = (w for w in itertools.product(range(low, high + 1), repeat=5) if sum(w) == 5 * bits)
    assert total(widths) <= min(map(total, every)) * (1 + 1e-12)


def test_a_mean_out_of_bounds_is_refused():
    with pytest.raises(UserError, match="widths from 4 to 8 of mean 3; write a mean between them"):
        allocate_widths(np.ones(4), 3, 4, 8)


# Losses


@pytest.mark.parametrize("act_order", [False, True])
def test_losses_are_what_the_channels_of_gptq_contribute(act_order):
    """(w - q)^2 / (2 U_kk^2), w the compensated weight: in float64, from the paper's recurrence."""
    weight, _, stats = layer()
    spec, options = QuantSpec(bits=3, group_size=64), GPTQOptions(act_order=act_order)
    factor = factorize(stats, options)
    codes, scales, zeros = gptq(weight, factor, spec, options)
    difference = weight - per_channel(scales, K, 64) * (np.asarray(codes, float) - per_channel(zeros, K, 64))
    order = np.asarray(factor.order)
    damped = np.asarray(stats.hessian, np.float64) + float(factor.damping) * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    expected = np.empty(K)
    expected[order] = np.square(np.linalg.solve(upper.T, difference[order])).sum(1) / 2
    got, error = map(np.asarray, channel_losses(weight, factor, spec, options))
    # A sum of K products in float32, of a factor good to 1e-5 of its largest, squared; small losses are differences.
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * expected.max())
    assert got.sum() == pytest.approx(np.trace(difference.T @ damped @ difference) / 2, rel=1e-4)
    assert error == pytest.approx(np.trace(difference.T @ np.asarray(stats.hessian, float) @ difference) / 2, rel=1e-4)


# Codes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_codes_are_those_of_the_sweep_at_their_widths(group_size, symmetric):
    weight, _, stats = layer()
    spec = mixed(3, group_size, symmetric)
    permutation, codes, scales, zeros, widths = whole(*baq_segments(weight, stats, spec, BAQOptions()))
    of_channel = np.repeat(widths, 128)
    assert len(set(widths)) > 1
    assert list(widths) == sorted(widths, reverse=True)
    assert np.mean(widths) == 3
    np.testing.assert_array_equal(np.sort(permutation), np.arange(K))
    assert (codes < 2 ** of_channel[:, None]).all()
    np.testing.assert_array_equal(scales, np.asarray(jnp.asarray(scales).astype(jnp.bfloat16), np.float32))
    if symmetric:
        zeros = np.repeat(np.where(of_channel == 1, 0.5, 2.0 ** (of_channel - 1))[::group_size, None], N, axis=1)

    back = np.argsort(permutation)
    grid = [per_channel(a, K, group_size)[back] for a in (scales, zeros)]
    factor = factorize(stats, GPTQOptions())
    top = (2.0**of_channel - 1)[back][:, None]
    want = codes_in_float64(weight, stats.hessian, float(factor.damping), factor.order, *grid, top)
    # Ties, as for GPTQ; of at most 2^8 levels, 64 output channels.
    assert (codes[back] != want).any(axis=0).sum() <= 4


@pytest.mark.parametrize(("bits", "spread", "share"), [(2, 1.2, 0.3), (3, 0.8, 0.75), (4, 0.8, 0.75)])
def test_loses_less_than_gptq_where_channels_differ(bits, spread, share):
    """Of the same size. Expected: GM/AM of the losses, 0.2 and 0.6 here."""
    weight, inputs, stats = layer(spread)
    spec = mixed(bits)
    tensor = SegmentedQTensor.from_segments(*baq_segments(weight, stats, spec, BAQOptions()), spec, (K, N))
    uniform = QuantSpec(bits=bits, group_size=64)
    codes, scales, zeros = gptq(weight, stats, uniform, GPTQOptions())
    plain = per_channel(scales, K, 64) * (np.asarray(codes, float) - per_channel(zeros, K, 64))
    assert 8 * tensor.nbytes == uniform.size_bits((K, N)) + 16 * K + 8 * K // 128
    ours, theirs = (output_error_float64(weight, q, inputs) for q in (np.asarray(tensor.dequantize(), float), plain))
    print("gain", ours / theirs, tensor.widths)
    assert ours < share * theirs


@pytest.mark.parametrize(("rank", "harmful"), [(64, False), (256, True)])
def test_the_guard_keeps_one_width_where_the_mixture_does_harm(rank, harmful):
    """Nearly dependent inputs: what is made up for in a channel of little energy leaves its range, and is cut off."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4096, rank)) @ rng.standard_normal((rank, K)) / np.sqrt(rank)
    inputs += 0.03 * rng.standard_normal((4096, K))
    weight, spec = rng.standard_normal((K, N)).astype(np.float32), mixed(2)
    errors, widths = {}, {}
    for guard in (False, True):
        segments = baq_segments(weight, hessian_stats(inputs), spec, BAQOptions(guard=guard))
        tensor = SegmentedQTensor.from_segments(*segments, spec, (K, N))
        errors[guard] = output_error_float64(weight, np.asarray(tensor.dequantize(), float), inputs)
        widths[guard] = tensor.widths
    assert len(set(widths[False])) > 1
    if harmful:
        assert set(widths[True]) == {2}
        assert errors[False] > 1.2 * errors[True]
    else:
        assert widths[True] == widths[False]


def test_is_gptq_where_all_widths_are_equal():
    weight, _, stats = layer()
    permutation, ((bits, codes, scales, zeros),) = baq_segments(weight, stats, mixed(), BAQOptions(low=3, high=3))
    assert bits == 3
    np.testing.assert_array_equal(permutation, np.arange(K))
    expected = gptq(weight, stats, QuantSpec(bits=3, group_size=64), GPTQOptions())
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(zeros, expected[2])
    assert (np.asarray(codes) != np.asarray(expected[0])).any(axis=0).sum() <= 1


def test_compiles_once_whatever_the_widths():
    jax.clear_caches()
    for spread in (0.2, 0.8, 1.4):
        found = whole(*baq_segments(*layer(spread)[::2], mixed(), BAQOptions()))[4]
        assert (len(set(found)) > 1) == (spread > 0.2)
    assert channel_losses._cache_size() == 1
    assert sweep_runs._cache_size() == 1


# Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 4}, "baq: 3 bits of runs from 4 to 8; write other low and high"),
        (
            {"static_groups": False, "act_order": False},
            "baq: the ranges of a mixed spec are found before the sweep; write static_groups true",
        ),
        ({"low": 0}, "baq: option low: 0, high: 8; write widths from 1 to 8"),
        ({"slope": 0.0}, "baq: option slope: 0.0; write a number above 0, such as 1.6"),
    ],
)
def test_options_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        BAQOptions(**given).check(mixed())


def test_a_matrix_that_is_not_mixed_is_refused():
    weight, _, stats = layer()
    with pytest.raises(ValueError, match=r"does not mix a matrix \(512, 64\)"):
        baq_segments(weight, stats, QuantSpec(bits=3), BAQOptions())
