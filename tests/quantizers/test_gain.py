"""Scales with unit gain: the inner products that they restore, in float64, and codes that stay what they were."""

import jax.numpy as jnp
import numpy as np
import pytest

from lq.calibration.statistics import InputStats
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, Recipe
from lq.quantizers.apply import quantize_leaf
from lq.quantizers.gain import unit_gain

pytestmark = pytest.mark.once

K, N = 256, 48
HALF = 2.0**-9  # of rounding to bfloat16, which scales are stored in


@pytest.fixture(scope="module")
def layer():
    """Weights, one output channel without any, and statistics of inputs that are correlated, of different energies."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)) / 16)
    x *= np.exp(rng.standard_normal(K) / 2)
    weight = rng.standard_normal((K, N))
    weight[:, 5] = 0.0
    hessian = (x.T @ x).astype(np.float32)
    stats = InputStats(tokens=600.0, hessian=jnp.asarray(hessian), square=jnp.asarray(np.diag(hessian)))
    return jnp.asarray(weight, jnp.float32), stats


def packed(layer, method, spec, **options):
    weight, stats = layer
    recipe = Recipe(method=method, options=QUANTIZERS.options(method, options))
    prepare = recipe.quantizer.prepare
    return quantize_leaf(weight, stats, stats if prepare is None else prepare(stats, recipe.options), spec, recipe)


def grouped(a, length):
    return np.asarray(a, np.float64).reshape(-1, length, N)


@pytest.mark.parametrize(
    ("bits", "symmetric", "importance"),
    [(1, False, False), (1, True, True), (2, False, True), (3, True, False), (4, False, True)],
)
def test_a_group_rounded_to_nearest_keeps_its_size(layer, bits, symmetric, importance):
    spec = QuantSpec(bits=bits, group_size=64, symmetric=symmetric)
    options = {"clip": "opt", "importance": importance}
    plain, found = (packed(layer, "rtn", spec, unit_gain=gain, **options).dequantize() for gain in (False, True))
    weight, plain, found = grouped(layer[0], 64), grouped(plain, 64), grouped(found, 64)
    energy = np.asarray(layer[1].square, np.float64).reshape(-1, 64, 1) if importance else 1.0
    whole, left = (energy * weight * weight).sum(1), (energy * weight * plain).sum(1)
    gain = np.where(whole > 0, whole / np.where(whole > 0, left, 1.0), 1.0)
    # Two codes of which one is zero leave less than half of some groups; all others have their size again.
    assert gain.max() < 2 or (bits == 1 and not symmetric)
    given = np.minimum(gain, 2.0)
    # The same codes, times a number for each group; both scales are rounded.
    np.testing.assert_allclose(found, plain * given[:, None], rtol=3 * HALF, atol=1e-7)
    np.testing.assert_allclose((energy * weight * found).sum(1), whole * given / gain, rtol=2 * HALF)


def test_of_one_bit_it_is_known_in_closed_form():
    """Codes are signs, and sum w^2 / sum |w| stands for them, whatever range was chosen."""
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((K, N)), jnp.float32)
    spec = QuantSpec(bits=1, group_size=None, symmetric=True, scale_dtype="float32")
    w = np.asarray(weight, np.float64)
    for clip in ("mse", "opt"):
        found = packed((weight, None), "rtn", spec, clip=clip, unit_gain=True).dequantize()
        expected = np.sign(w) * (w**2).sum(0) / np.abs(w).sum(0)
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (QuantSpec(bits=2, group_size=64), {}),
        (QuantSpec(bits=2, group_size=64), {"act_order": False}),
        (QuantSpec(bits=2, group_size=None, symmetric=True), {}),
        (QuantSpec(bits=2, group_size=64, by_energy=True), {}),
        (QuantSpec(bits=4, group_size=64, widths=(4, 3, 2, 2)), {}),
        (QuantSpec(bits=4, group_size=64, widths=(4, 3, 2, 2)), {"static_groups": True}),
        (QuantSpec(bits=2, group_size=128, mixed=True), {"method": "baq"}),
    ],
    ids=lambda value: str(value) if isinstance(value, QuantSpec) else ",".join(map(str, value.values())),
)
def test_the_outputs_of_a_sweep_keep_their_size(layer, spec, options):
    """In the damped second moment of the inputs, over all groups of an output channel at once."""
    method, options = options.get("method", "gptq"), {k: v for k, v in options.items() if k != "method"}
    plain, found = (
        np.asarray(packed(layer, method, spec, unit_gain=gain, **options).dequantize(), np.float64)
        for gain in (False, True)
    )
    weight, hessian = np.asarray(layer[0], np.float64), np.asarray(layer[1].hessian, np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(K)
    inner = lambda a, b: np.sum(a * (damped @ b), 0)  # noqa: E731
    whole = inner(weight, weight)
    gain = np.where(whole > 0, whole / np.where(whole > 0, inner(weight, plain), 1.0), 1.0)
    assert (gain[whole > 0] > 1.0).all(), "the grid of least error gives less than it was given"
    np.testing.assert_allclose(found, plain * gain, rtol=3 * HALF, atol=1e-7)


def test_eight_bits_have_little_to_give_back(layer):
    spec = QuantSpec(bits=8, group_size=64)
    for method in ("rtn", "gptq"):
        plain, found = (packed(layer, method, spec, unit_gain=gain).dequantize() for gain in (False, True))
        np.testing.assert_allclose(np.asarray(found), np.asarray(plain), rtol=2e-3)


def test_what_is_not_the_same_times_a_number_is_held_back():
    original = jnp.asarray([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    rounded = jnp.asarray([[0.5, 0.1, 9.0, 0.3], [1.0, -0.9, 9.0, 0.2]])
    assert np.asarray(unit_gain(original, rounded))[0] == pytest.approx([2 / 1.5, 2.0, 0.5, 1.0])
    weighted = unit_gain(original, rounded, jnp.asarray([[3.0], [1.0]]))
    assert np.asarray(weighted)[0] == pytest.approx([4 / 2.5, 2.0, 0.5, 1.0])


def test_experts_have_their_own(layer):
    weight, stats = layer
    stack = jnp.stack([weight, 3.0 * weight])
    both = InputStats(
        tokens=jnp.asarray([600.0, 600.0]),
        hessian=jnp.stack([stats.hessian, stats.hessian[::-1, ::-1]]),
        square=jnp.stack([stats.square, stats.square[::-1]]),
    )
    spec = QuantSpec(bits=2, group_size=64)
    for method in ("rtn", "gptq"):
        found = packed((stack, both), method, spec, unit_gain=True).dequantize()
        alone = packed((stack[0], stats), method, spec, unit_gain=True).dequantize()
        np.testing.assert_allclose(np.asarray(found)[0], np.asarray(alone), rtol=1e-5, atol=1e-6)
