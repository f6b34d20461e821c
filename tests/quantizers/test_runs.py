"""Matrices whose spec gives widths by segment: which channels they hold, and what they are rounded to."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.models.matrices import matrices
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, Recipe
from lq.quantizers.apply import quantize_leaf, quantize_matrix
from lq.quantizers.gptq import GPTQOptions, factorize
from lq.quantizers.rtn import RTNOptions
from lq.quantizers.runs import sweep_in_order

pytestmark = pytest.mark.once

K, N = 256, 64
WIDTHS = (4, 3, 2, 2)


def spec_of(widths=WIDTHS, **fields):
    return QuantSpec(**({"bits": max(widths), "group_size": 32, "widths": widths} | fields))


@pytest.fixture(scope="module")
def layer():
    """Weights, and statistics of inputs that are correlated, of very different energies."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, K)) @ (np.eye(K) + 0.2 * rng.standard_normal((K, K)) / 16)
    x *= np.exp(rng.standard_normal(K))
    weight = jnp.asarray(rng.standard_normal((K, N)), jnp.float32)
    hessian = (x.T @ x).astype(np.float32)
    return weight, InputStats(tokens=600.0, hessian=jnp.asarray(hessian), square=jnp.asarray(np.diag(hessian)))


def packed(layer, method, spec, **options):
    weight, stats = layer
    recipe = Recipe(method=method, options=QUANTIZERS.options(method, options))
    prepare = recipe.quantizer.prepare
    prepared = stats if prepare is None else prepare(stats, recipe.options)
    return quantize_leaf(weight, stats, prepared, spec, recipe)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_first_group_has_the_channels_of_most_energy(layer, method):
    tensor = packed(layer, method, spec_of())
    energies = np.asarray(layer[1].square)
    groups = np.asarray(tensor.channels)
    assert (np.bincount(groups) == 32).all()
    for i in range(7):
        assert energies[groups == i].min() >= energies[groups == i + 1].max()
    assert tensor.widths == WIDTHS
    permutation = np.asarray(tensor.permutation)
    assert (np.diff(permutation.reshape(8, -1), axis=1) > 0).all(), "in their own order within a group"


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_to_nearest_is_that_of_each_segment_alone(layer, symmetric):
    spec = spec_of(symmetric=symmetric)
    tensor = packed(layer, "rtn", spec)
    found, weight = np.asarray(tensor.dequantize()), np.asarray(layer[0])
    for i, bits in enumerate(WIDTHS):
        rows = np.asarray(tensor.permutation)[i * K // 4 : (i + 1) * K // 4]
        alone = quantize_matrix(jnp.asarray(weight[rows]), None, spec.segment(bits), "rtn", RTNOptions())
        np.testing.assert_array_equal(found[rows], np.asarray(alone.dequantize()))


@pytest.mark.parametrize("options", [{}, {"block": 32}, {"static_groups": True}])
def test_equal_widths_are_gptq_on_the_sorted_channels(layer, options):
    """The same sweep: another order of storage changes the groups, and nothing else."""
    weight, stats = layer
    tensor = packed(layer, "gptq", spec_of((3, 3, 3, 3)), **options)
    order = np.argsort(-np.diagonal(stats.hessian), kind="stable")
    hessian = np.asarray(stats.hessian)[np.ix_(order, order)]
    permuted = weight[order], InputStats(tokens=600.0, hessian=jnp.asarray(hessian))
    plain = packed(permuted, "gptq", QuantSpec(bits=3, group_size=32), act_order=False, **options)
    found, expected = np.asarray(tensor.dequantize())[order], np.asarray(plain.dequantize())
    assert (found != expected).mean() < 2e-3, "ties of rounding, where sums run in another order"


@pytest.mark.parametrize("static", [True, None])
def test_a_mixed_sweep_in_float64(layer, static):
    """Channel by channel, each rounded on the grid of its group, the others making up for it."""
    weight, stats = layer
    spec, options = spec_of(), GPTQOptions(static_groups=static)
    factor = factorize(stats, options)
    tensor = packed(layer, "gptq", spec, static_groups=static)
    widths = np.asarray(WIDTHS)[np.asarray(tensor.channels) // 2]
    position = np.argsort(np.asarray(tensor.permutation))
    scale, zero = np.concatenate([np.asarray(s.packed().scales, np.float64) for s in tensor.segments]), []
    zero = np.concatenate([np.asarray(s.packed().zeros, np.float64) for s in tensor.segments])
    group = position // 32

    hessian = np.asarray(stats.hessian, np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(K)
    w, q = np.asarray(weight, np.float64), np.zeros((K, N))
    left = np.asarray(factor.order)
    while left.size:
        k = left[0]
        level = np.clip(np.round(w[k] / scale[group[k]]) + zero[group[k]], 0, 2 ** widths[k] - 1)
        q[k] = scale[group[k]] * (level - zero[group[k]])
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        w[left] -= np.outer(inverse[:, 0] / inverse[0, 0], w[k] - q[k])
        left = left[1:]
    found = np.asarray(tensor.dequantize(), np.float64)
    assert (found != q).mean() < 0.01, "a tie that float32 rounds otherwise, and what follows from it"
    lost = lambda d: float(np.sum(d * (hessian @ d)))  # noqa: E731
    assert lost(found - np.asarray(weight)) == pytest.approx(lost(q - np.asarray(weight)), rel=2e-3)


def test_more_bits_where_energy_is_lose_less(layer):
    weight, hessian = np.asarray(layer[0], np.float64), np.asarray(layer[1].hessian, np.float64)

    def lost(tensor):
        d = np.asarray(tensor.dequantize(), np.float64) - weight
        return float(np.sum(d * (hessian @ d)))

    falling, rising = (packed(layer, "gptq", spec_of(widths)) for widths in ((4, 3, 3, 2), (2, 3, 3, 4)))
    plain = packed(layer, "gptq", QuantSpec(bits=3, group_size=32))
    assert lost(falling) < lost(plain) < lost(rising)


def test_widths_share_a_program(layer):
    before = sweep_in_order._cache_size()
    for widths in ((4, 3, 2, 2), (2, 2, 2, 1), (8, 1, 1, 1)):
        packed(layer, "gptq", spec_of(widths))
    assert sweep_in_order._cache_size() - before <= 1


def test_what_cannot_be():
    with pytest.raises(UserError, match="widths: autoround cannot round a matrix in groups or segments of channels"):
        Recipe(method="autoround").check(None, {"block_0/mlp/up_proj": spec_of()})
    with pytest.raises(UserError, match="by_energy: awq cannot round a matrix in groups or segments of channels"):
        Recipe(method="awq").check(None, {"block_0/mlp/up_proj": QuantSpec(bits=4, by_energy=True)})
    for spec, options, line in (
        (spec_of(), {}, "widths: groups of channels by the energy of the inputs, which rtn does not look at"),
        (QuantSpec(bits=4, by_energy=True), {"clip": "opt"}, "write its options clip: opt and importance: true"),
    ):
        with pytest.raises(UserError, match=line):
            Recipe(options=RTNOptions(**options)).check(None, {"block_0/mlp/up_proj": spec})


def test_groups_by_energy_where_no_matrix_or_not_every_one_has_several():
    config = llama_config(1)  # 64 and 128 input channels
    specs = lambda size: dict.fromkeys(matrices(config), QuantSpec(bits=4, group_size=size, by_energy=True))  # noqa: E731
    with pytest.raises(UserError, match="by_energy: no matrix of this model has several whole groups"):
        Recipe(method="gptq").check(config, specs(128))
    recipe = Recipe(method="gptq")
    recipe.check(config, specs(64))
    assert "by_energy: 6 of 7 matrices keep groups of neighbours" in recipe.notes(config, specs(64))[1]
    assert not any("by_energy" in line for line in recipe.notes(config, specs(32)))
    recipe = Recipe(method="gptq", options=GPTQOptions(static_groups=False))
    recipe.check(config, specs(32))
    with pytest.raises(UserError, match=r"static_groups false, but the groups of block_0/attention/._proj are"):
        recipe.check(config, specs(64))
