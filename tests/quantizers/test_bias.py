"""The bias correction takes the mean error off every output channel, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.calibration.statistics import reduce_inputs
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_matrix
from lq.quantizers.bias import bias_correction
from lq.quantizers.rtn import RTNOptions

pytestmark = pytest.mark.once

T, K, N = 3000, 96, 40


def case(*lead):
    """Inputs whose channels have means, a weight, and its 2-bit version."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((*lead, T, K)) + rng.standard_normal((*lead, 1, K))).astype(np.float32)
    weight = rng.standard_normal((*lead, K, N)).astype(np.float32)
    quantized = quantize_matrix(jnp.asarray(weight), None, QuantSpec(bits=2, group_size=32), "rtn", RTNOptions())
    return x, weight, np.asarray(quantized.dequantize())


@pytest.mark.parametrize("batches", [1, 3])
def test_the_mean_error_of_every_output_channel_is_zero_after_it(batches):
    x, weight, quantized = case()
    sums = [reduce_inputs(jnp.asarray(part), frozenset({"total"})) for part in np.split(x, batches)]
    correction = jax.jit(bias_correction)(weight, quantized, sum(sums[1:], sums[0]))
    assert correction.dtype == jnp.float32
    y, y_quantized = (x.astype(np.float64) @ w.astype(np.float64) for w in (weight, quantized))
    left = (y_quantized + np.asarray(correction, np.float64) - y).mean(0)
    assert np.abs((y_quantized - y).mean(0)).max() > 0.5, "there was something to correct"
    # float32: the sum of 3000 inputs by pairs or lanes, the mean, the error and K products: less than 100 roundings.
    magnitude = np.abs(x.astype(np.float64)).mean(0) @ np.abs(weight - quantized)
    assert (np.abs(left) <= 100 * 2.0**-24 * magnitude).all()


def test_tokens_count_with_their_weights():
    x, weight, quantized = case()
    shares = np.random.default_rng(1).uniform(0, 1e-4, T).astype(np.float32)  # together less than one token
    stats = reduce_inputs(jnp.asarray(x), frozenset({"total"}), jnp.asarray(shares))
    want = np.average(x.astype(np.float64) @ (weight - quantized).astype(np.float64), axis=0, weights=shares)
    np.testing.assert_allclose(bias_correction(weight, quantized, stats), want, atol=1e-4 * np.abs(want).max())


def test_experts_are_corrected_each_by_its_own_tokens():
    x, weight, quantized = case(2)
    first, second = (reduce_inputs(jnp.asarray(part), frozenset({"total"})) for part in (x[0], x[1][:0]))
    stats = jax.tree.map(lambda *a: jnp.stack(a), first, second)
    correction = bias_correction(weight, quantized, stats)
    want = bias_correction(weight[0], quantized[0], first)
    np.testing.assert_allclose(correction[0], want, rtol=1e-5, atol=1e-5)
    assert (correction[1] == 0).all(), "no token, no correction"


def test_statistics_without_the_sum_are_refused():
    x, weight, quantized = case()
    with pytest.raises(ValueError, match="these statistics have no total"):
        bias_correction(weight, quantized, reduce_inputs(jnp.asarray(x), frozenset({"hessian"})))
