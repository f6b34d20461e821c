"""AdaQuant: gradients in closed form, zero points that are codes or numbers, ranges that stay positive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_layers import hessian_stats, random_weight

from lq.errors import UserError
from lq.numerics.spec import QuantSpec
from lq.quantizers.adaquant import ADAQUANT, LEAST_RANGE, AdaQuantOptions, adaquant
from lq.quantizers.parametrization import export, fake_quant, initial
from lq.quantizers.rtn import RTNOptions, rtn

pytestmark = pytest.mark.once

OPTIONS = AdaQuantOptions(start="minmax")


def moved_theta(weight, spec, seed=0):
    """Weights moved by a scale or so, ranges by a fifth, offsets by a tenth of the range."""
    theta, fixed = initial(ADAQUANT, weight, spec, OPTIONS)
    rng = np.random.default_rng(seed)
    moved = {"V": rng.standard_normal(theta["V"].shape), "range": rng.uniform(0.6, 1.0, theta["range"].shape)}
    if not spec.symmetric:
        moved["offset"] = rng.uniform(-0.1, 0.1, theta["offset"].shape)
    assert moved.keys() == theta.keys()
    return {name: jnp.asarray(value, jnp.float32) for name, value in moved.items()}, fixed


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", ["code", "number", "constant"])
def test_gradients_in_closed_form(bits, zero):
    """Inside the range W^ = s round((W + V) / s), beyond it s (q - z) with z = -l / s, l the lower end."""
    weight, cotangent = random_weight(64, 5), np.random.default_rng(1).standard_normal((64, 5))
    kind = {"code": {}, "number": {"zero_dtype": "bfloat16"}, "constant": {"symmetric": True}}[zero]
    spec = QuantSpec(bits=bits, group_size=32, **kind)
    theta, fixed = moved_theta(jnp.asarray(weight), spec)
    arguments = (fixed, jnp.asarray(weight), spec, OPTIONS)
    _, pull = jax.vjp(lambda theta: fake_quant(ADAQUANT, theta, *arguments), theta)
    got = pull(jnp.asarray(cotangent, jnp.float32))[0]

    codes, scales, zeros = export(ADAQUANT, theta, *arguments)
    W, G = weight.astype(np.float64).reshape(2, 32, 5), cotangent.reshape(2, 32, 5)
    q, s = np.asarray(codes, np.float64).reshape(2, 32, 5), np.asarray(scales, np.float64)[:, None]
    z = np.full_like(s, spec.zero_point) if zeros is None else np.asarray(zeros, np.float64)[:, None]
    s0, low = np.asarray(fixed["scale"], np.float64), np.asarray(fixed["low"], np.float64)
    changed = W + s0 * np.asarray(theta["V"], np.float64).reshape(2, 32, 5)
    nearest = np.round(changed / s + z)
    inside = (nearest >= 0) & (nearest <= spec.max_code)
    assert 0.02 < (~inside).mean() < 0.9, "both cases occur"
    if not spec.symmetric:
        low = low + np.asarray(theta["offset"], np.float64) * spec.max_code * s0
    of_scale = np.where(inside, (q - z) - changed / s, (q - z) - (0 if spec.symmetric else low / s))
    # Sums of 32 products in float32, each of up to 2^bits scales.
    tolerance = 100 * 2.0**-24 * 2**bits * np.abs(G).max() * np.abs(changed).max() * 10
    of_change = np.where(inside, G * s0, 0)
    np.testing.assert_allclose(np.asarray(got["V"]).reshape(W.shape), of_change, atol=tolerance)
    np.testing.assert_allclose(np.asarray(got["range"]), (G * of_scale).sum(1, keepdims=True) * s0, atol=tolerance)
    if not spec.symmetric:
        of_offset = (G * ~inside).sum(1, keepdims=True) * spec.max_code * s0
        np.testing.assert_allclose(np.asarray(got["offset"]), of_offset, atol=tolerance)


def test_zero_points_that_are_numbers_need_not_be_whole():
    weight = jnp.asarray(random_weight(64, 5))
    whole, number = QuantSpec(bits=3, group_size=32), QuantSpec(bits=3, group_size=32, zero_dtype="bfloat16")
    theta, fixed = moved_theta(weight, whole)
    codes = export(ADAQUANT, theta, fixed, weight, whole, OPTIONS)[2]
    numbers = export(ADAQUANT, theta, fixed, weight, number, OPTIONS)[2]
    assert codes.dtype == jnp.uint32
    numbers = np.asarray(numbers, np.float64)
    assert (numbers != np.round(numbers)).any()
    # Half a code, and what bfloat16 makes of a number up to 8.
    assert np.abs(numbers - np.asarray(codes, np.float64)).max() <= 0.5 + 8 * 2.0**-9


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_is_gained_where_inputs_are_uncorrelated_and_ranges_fixed(symmetric):
    """With H = I the error is a sum over weights, and round to nearest has the least of each."""
    weight = jnp.asarray(random_weight(96, 8))
    spec = QuantSpec(bits=3, group_size=32, symmetric=symmetric)
    options = AdaQuantOptions(start="minmax", range_learning_rate=0.0)
    found = adaquant(weight, hessian_stats(np.eye(96)), spec, options)
    for ours, nearest in zip(found, rtn(weight, None, spec, RTNOptions(clip="none")), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(nearest))


def test_no_range_is_driven_through_zero():
    weight = jnp.asarray(random_weight(64, 5))
    for symmetric in (False, True):
        spec = QuantSpec(bits=2, group_size=32, symmetric=symmetric)
        theta, fixed = initial(ADAQUANT, weight, spec, OPTIONS)
        driven = ADAQUANT.project(theta | {"range": theta["range"] - 5.0}, fixed, OPTIONS)
        scales = np.asarray(export(ADAQUANT, driven, fixed, weight, spec, OPTIONS)[1])
        start = np.asarray(export(ADAQUANT, theta, fixed, weight, spec, OPTIONS)[1])
        np.testing.assert_allclose(scales, LEAST_RANGE * start, rtol=2.0**-7)


def test_weights_and_ranges_have_their_own_rates():
    options = AdaQuantOptions(steps=40, learning_rate=0.02, range_learning_rate=0.003)
    theta, _ = initial(ADAQUANT, jnp.asarray(random_weight(64, 5)), QuantSpec(bits=3, group_size=32), options)
    optimizer = ADAQUANT.optimizer(QuantSpec(bits=3), options)
    gradient = {name: jnp.full_like(value, -7.0) for name, value in theta.items()}
    update, _ = optimizer.update(gradient, optimizer.init(theta), theta)  # Adam moves by the rate, at first
    for name, rate in (("V", 0.02), ("range", 0.003), ("offset", 0.003)):
        np.testing.assert_allclose(np.asarray(update[name]), rate, rtol=1e-4)
    state = optimizer.init(theta)
    for _ in range(31):
        update, state = optimizer.update(gradient, state, theta)
    falls = (1 + np.cos(np.pi * 30 / 40)) / 2  # at step 30 of 40
    np.testing.assert_allclose(np.asarray(update["V"]), 0.02 * falls, rtol=1e-4)


def test_a_negative_rate_is_refused():
    with pytest.raises(UserError, match=r"^adaquant: option range_learning_rate: -1; write a number from 0$"):
        AdaQuantOptions(range_learning_rate=-1)
