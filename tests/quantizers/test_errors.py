"""The output error from the second moment is that of the outputs themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_layers import correlated_inputs, hessian_stats, output_error_float64, random_weight

from lq.calibration.statistics import InputStats
from lq.quantizers.errors import output_error

pytestmark = pytest.mark.once


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_equals_the_error_of_the_outputs(size):
    inputs, weight = correlated_inputs(300, 96), random_weight(96, 40)
    other = weight + size * random_weight(96, 40, seed=2)
    got = float(output_error(weight, other, hessian_stats(inputs)))
    # A sum of float32 products of one sign but for correlations; the difference of weights is rounded to 2^-24 of them.
    assert got == pytest.approx(output_error_float64(weight, other, inputs), rel=1e-4 if size == 1.0 else 1e-3)


def test_experts_have_one_each():
    inputs = np.stack([correlated_inputs(200, 64, seed) for seed in range(3)])
    weight, other = random_weight(3, 64, 8), random_weight(3, 64, 8, seed=3)
    got = np.asarray(output_error(weight, other, hessian_stats(inputs)))
    expected = [output_error_float64(w, q, x) for w, q, x in zip(weight, other, inputs, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_ends():
    stats, weight = hessian_stats(correlated_inputs(100, 32)), random_weight(32, 4)
    assert float(output_error(weight, weight, stats)) == 0
    assert float(output_error(weight, np.zeros_like(weight), stats)) == pytest.approx(1.0)
    nothing = InputStats(tokens=jnp.float32(0), hessian=jnp.zeros((32, 32)))
    assert float(output_error(weight, 2 * weight, nothing)) == 0
    assert np.isnan(output_error(weight, np.nan * weight, stats)), "what is not finite is not hidden"
    with pytest.raises(ValueError, match="statistics with a hessian"):
        output_error(weight, weight, InputStats(tokens=jnp.float32(1)))


@pytest.mark.parametrize(
    ("channels", "taken"), [(20, slice(None, None, 2)), (15, slice(None, None, 3)), (40, slice(None))]
)
def test_of_some_output_channels(channels, taken):
    stats, weight = hessian_stats(correlated_inputs(100, 32)), random_weight(32, 40)
    other = weight + random_weight(32, 40, seed=2)
    got = float(output_error(weight, other, stats, channels))
    assert got == pytest.approx(float(output_error(weight[:, taken], other[:, taken], stats)), rel=1e-5)
