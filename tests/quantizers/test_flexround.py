"""FlexRound: gradients in closed form, which codes can be reached, what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_layers import dequantized_float64, random_weight

from lq.numerics.spec import QuantSpec
from lq.quantizers.flexround import FLEXROUND, LARGEST_DELTA, FlexRoundOptions
from lq.quantizers.parametrization import export, fake_quant, initial

pytestmark = pytest.mark.once

OPTIONS = FlexRoundOptions(start="minmax")


def moved_theta(weight, spec, size=0.3, seed=0):
    theta, fixed = initial(FLEXROUND, weight, spec, OPTIONS)
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(size * rng.standard_normal(v.shape), jnp.float32) for k, v in theta.items()}, fixed


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_in_closed_form(bits, symmetric):
    """Inside the range dW^ / dS2 = -W / (S2^2 s3), in log S2 therefore -W / (S2 s3)."""
    weight, cotangent = random_weight(64, 5), np.random.default_rng(1).standard_normal((64, 5))
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
    theta, fixed = moved_theta(jnp.asarray(weight), spec)
    arguments = (fixed, jnp.asarray(weight), spec, OPTIONS)
    _, pull = jax.vjp(lambda theta: fake_quant(FLEXROUND, theta, *arguments), theta)
    got = pull(jnp.asarray(cotangent, jnp.float32))[0]

    codes, scales, _ = export(FLEXROUND, theta, *arguments)
    W, G = weight.astype(np.float64).reshape(2, 32, 5), cotangent.reshape(2, 32, 5)
    q = np.asarray(codes, np.float64).reshape(2, 32, 5)
    s, z = np.asarray(scales, np.float64)[:, None], np.asarray(fixed["zero"], np.float64)
    S = np.exp(np.asarray(theta["delta2"], np.float64).reshape(2, 32, 5) + np.asarray(theta["delta3"], np.float64))
    nearest = np.round(W / (s * S)) + z
    inside = (nearest >= 0) & (nearest <= spec.max_code)
    assert 0.02 < (~inside).mean() < 0.9, "both cases occur"
    exact = np.asarray(fixed["scale"], np.float64) * np.exp(np.asarray(theta["delta1"], np.float64))
    of_scale = np.where(inside, (q - z) - W / (s * S), q - z)
    of_delta2 = np.where(inside, -W / S, 0) * G
    # Sums of 64 products in float32, each of up to 2^bits scales.
    tolerance = 100 * 2.0**-24 * 2**bits * np.abs(G).max() * np.abs(W).max() * 10
    np.testing.assert_allclose(np.asarray(got["delta2"]).reshape(W.shape), of_delta2, atol=tolerance)
    np.testing.assert_allclose(np.asarray(got["delta3"]), of_delta2.sum((0, 1)), atol=tolerance)
    of_delta1 = (G * of_scale).sum(1, keepdims=True) * exact
    np.testing.assert_allclose(np.asarray(got["delta1"]), of_delta1, atol=tolerance)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_on_a_weights_side_of_zero_can_be_reached(symmetric):
    """exp(delta2) = W / (s1 k) gives the level k of the sign of W, and more than 2 |W| / s1 gives 0."""
    weight = jnp.asarray(random_weight(64, 5))
    spec = QuantSpec(bits=3, group_size=32, symmetric=symmetric)
    theta, fixed = initial(FLEXROUND, weight, spec, OPTIONS)
    scale, zero = (np.repeat(np.asarray(fixed[name], np.float64)[:, 0], 32, 0) for name in ("scale", "zero"))
    level = np.asarray(weight, np.float64) / scale
    for k in range(1, spec.max_code + 1):
        codes = export(
            FLEXROUND,
            theta | {"delta2": jnp.asarray(np.log(np.abs(level) / k), jnp.float32)},
            fixed,
            weight,
            spec,
            OPTIONS,
        )[0]
        wanted = np.clip(zero + k * np.sign(level), 0, spec.max_code)
        np.testing.assert_array_equal(np.asarray(codes), wanted)
    away = theta | {"delta2": jnp.asarray(np.log(2.001 * np.abs(level)), jnp.float32)}
    np.testing.assert_array_equal(np.asarray(export(FLEXROUND, away, fixed, weight, spec, OPTIONS)[0]), zero)


def test_the_divisors_are_not_needed_once_codes_are_stored():
    weight = jnp.asarray(random_weight(80, 5))
    spec = QuantSpec(bits=3, group_size=32)
    theta, fixed = moved_theta(weight, spec)
    found = export(FLEXROUND, theta, fixed, weight, spec, OPTIONS)
    trained = fake_quant(FLEXROUND, theta, fixed, weight, spec, OPTIONS)
    np.testing.assert_allclose(dequantized_float64(found, spec), np.asarray(trained), rtol=2.0**-23)
    learned = np.asarray(fixed["scale"][:, 0]) * np.exp(np.asarray(theta["delta1"][:, 0]))
    np.testing.assert_allclose(np.asarray(found[1]), learned, rtol=2.0**-8)  # rounded to bfloat16


def test_deltas_stay_where_the_exponential_is_harmless():
    theta, fixed = moved_theta(jnp.asarray(random_weight(64, 5)), QuantSpec(bits=2, group_size=32), size=50)
    for delta in FLEXROUND.project(theta, fixed, OPTIONS).values():
        assert np.abs(np.asarray(delta)).max() == LARGEST_DELTA


def test_the_learning_rate_is_a_cosine_that_ends_at_zero():
    """Adam moves by the rate itself as long as the gradient stays the same."""
    optimizer = FLEXROUND.optimizer(QuantSpec(bits=3), FlexRoundOptions(steps=40, learning_rate=0.02))
    state, gradient = optimizer.init(jnp.zeros(2)), jnp.asarray([4.0, -0.3])
    for t in range(40):
        update, state = optimizer.update(gradient, state)
        rate = 0.02 * (1 + np.cos(np.pi * t / 40)) / 2
        # Adam's two averages are corrected for their start by powers of 0.9 and 0.999 in float32.
        np.testing.assert_allclose(np.asarray(update), [-rate, rate], rtol=1e-4)
