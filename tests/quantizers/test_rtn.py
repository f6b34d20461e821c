"""Round to nearest: against the original GPTQ quantizer's outputs, closed forms, and Gaussian distortions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.errors import UserError
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_matrix, quantize_part
from lq.quantizers.recipe import Recipe
from lq.quantizers.rtn import ASYMMETRIC, SYMMETRIC, RTNOptions, rtn

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent.parent / "fixtures" / "quantizers" / "gptq_round_to_nearest.npz"


def dequantized(weight, spec, **options):
    return np.asarray(quantize_matrix(jnp.asarray(weight), None, spec, "rtn", RTNOptions(**options)).dequantize())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [-1, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mse", [0, 1])
def test_equals_the_original_gptq_quantizer(bits, group, symmetric, mse):
    golden = np.load(GOLDEN)
    want = golden[f"rtn_b{bits}_g{group}_{'sym' if symmetric else 'asym'}_mse{mse}"]
    spec = QuantSpec(bits=bits, group_size=None if group < 0 else group, symmetric=symmetric, scale_dtype="float32")
    convention = "symu" if symmetric else "asym0"
    got = dequantized(golden["W"].T, spec, convention=convention, clip="mse" if mse else "none").T
    # float32 scales computed in another order differ in the last bits, which moves a weight only when it lies on a tie:
    # a tie between two candidate ranges of the search moves one group, and the extreme element of a symmetric group
    # always is one.
    different = np.abs(got - want) > 1e-5 * np.abs(want).max()
    extremes = 1 / (256 if group < 0 else group) if symmetric else 0
    assert different.mean() <= 0.004 + extremes
    error = lambda w: np.square(w - golden["W"].astype(np.float64)).sum()  # noqa: E731
    assert error(got) == pytest.approx(error(want), rel=1e-3)


X = np.asarray([-1.0, -0.3, 0.05, 0.4, 2.0], np.float32)[:, None]


@pytest.mark.parametrize(
    ("convention", "bits", "values"),
    [
        ("asym0", 2, [-1, 0, 0, 0, 2]),
        ("asym0", 3, [-0.857143, -0.428571, 0, 0.428571, 2.142857]),
        ("asym0", 4, [-1, -0.2, 0, 0.4, 2]),
        ("symu", 3, [-1.142857, -0.571429, 0, 0.571429, 1.714286]),
        ("symr", 3, [-2 / 3, 0, 0, 2 / 3, 2]),  # s = 2/3: -1.5 is a tie and goes to even, -2; see below
        ("symf", 2, [-1, 0, 0, 0, 2]),  # s = -1: the extreme element is code -2
        ("symf", 1, [-2, -2, 2, 2, 2]),
    ],
)
def test_conventions_by_hand(convention, bits, values):
    spec = QuantSpec(bits=bits, group_size=None, symmetric=convention in SYMMETRIC, scale_dtype="float32")
    if convention == "symr":
        values = [-4 / 3, 0, 0, 2 / 3, 2]
    np.testing.assert_allclose(dequantized(X, spec, convention=convention, clip="none")[:, 0], values, atol=2e-6)


@pytest.mark.parametrize("convention", SYMMETRIC + ASYMMETRIC)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_nearest_levels(convention, bits):
    """No level of the stored grid is nearer to a weight than the one chosen, whatever the convention."""
    spec = QuantSpec(bits=bits, group_size=32, symmetric=convention in SYMMETRIC)
    weight = np.random.default_rng(bits).standard_normal((96, 8)).astype(np.float32)
    for clip in ("none", "mse"):
        codes, scale, zero = rtn(jnp.asarray(weight), None, spec, RTNOptions(convention=convention, clip=clip))
        scale = np.repeat(np.asarray(scale, np.float64), 32, 0)
        zero = spec.zero_point if zero is None else np.repeat(np.asarray(zero, np.float64), 32, 0)
        levels = (np.arange(spec.max_code + 1)[:, None, None] - zero) * scale
        nearest = np.abs(levels - weight).min(0)
        chosen = np.abs((np.asarray(codes, np.float64) - zero) * scale - weight)
        np.testing.assert_allclose(chosen, nearest, atol=2.0**-22 * np.abs(weight).max())


@pytest.mark.parametrize(
    ("bits", "group", "convention", "distortion"),
    [  # mean squared error on N(0, 1)
        (2, 32, "asym0", 0.165),
        (2, 128, "asym0", 0.253),
        (3, 64, "asym0", 0.0381),
        (4, 32, "asym0", 0.00653),
        (4, 128, "asym0", 0.0101),
        (2, 32, "symr", 0.432),
        (3, 128, "symr", 0.0748),
        (4, 64, "symr", 0.0116),
    ],
)
def test_gaussian_distortion(bits, group, convention, distortion):
    weight = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    spec = QuantSpec(bits=bits, group_size=group, symmetric=convention in SYMMETRIC, scale_dtype="float32")
    got = np.square(dequantized(weight, spec, convention=convention, clip="none") - weight).mean()
    # 262,144 weights; the tabulated values carry one percent of sampling noise themselves, and a third digit.
    assert got == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_search_never_increases_its_own_error(bits, symmetric):
    weight = np.random.default_rng(2).standard_t(3, (128, 16)).astype(np.float32)
    spec = QuantSpec(bits=bits, group_size=64, symmetric=symmetric)
    error = lambda clip: (np.abs(dequantized(weight, spec, clip=clip) - weight) ** 2.4).reshape(2, 64, 16).sum(1)  # noqa: E731
    assert (error("mse") <= error("none") * (1 + 1e-5)).all()
    assert error("mse").sum() < error("none").sum()


def test_codes_are_chosen_with_the_rounded_scale():
    """With a bfloat16 scale a weight is off by at most half a step of the stored grid, not of the ideal one."""
    weight = np.random.default_rng(1).standard_normal((128, 32)).astype(np.float32)
    tensor = quantize_matrix(jnp.asarray(weight), None, QuantSpec(bits=8), "rtn", RTNOptions(clip="none"))
    step = np.asarray(tensor.scales, np.float32)
    inside = (np.asarray(tensor.codes()) > 0) & (np.asarray(tensor.codes()) < 255)
    error = np.abs(np.asarray(tensor.dequantize()) - weight)
    assert (error <= step / 2 * (1 + 1e-5))[inside].all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_zero_and_constant_groups(symmetric, scale_dtype):
    weight = np.zeros((64, 3), np.float32)
    weight[:, 1], weight[:, 2] = 0.75, -3e-9
    spec = QuantSpec(bits=4, group_size=32, symmetric=symmetric, scale_dtype=scale_dtype)
    got = dequantized(weight, spec, clip="mse")
    assert np.isfinite(got).all()
    assert (got[:, 0] == 0).all()
    np.testing.assert_allclose(got[:, 1], 0.75, rtol=2.0**-7)
    assert np.abs(got[:, 2]).max() <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("convention", SYMMETRIC + ASYMMETRIC)
def test_small_weights_use_subnormal_float16_scales(convention, bits):
    """Weights of 1e-4 need scales below the smallest normal float16, 6.1e-5."""
    weight = np.random.default_rng(3).uniform(-1e-4, 1e-4, (64, 16)).astype(np.float32)
    error = {}
    for dtype in ("float16", "float32"):
        spec = QuantSpec(bits=bits, group_size=64, symmetric=convention in SYMMETRIC, scale_dtype=dtype)
        error[dtype] = np.abs(dequantized(weight, spec, convention=convention, clip="none") - weight).max()
    # A scale off by half of 2^-24 moves the farthest code by that many times 2^bits, and a weight to the next code.
    step = 2e-4 / (2**bits - 1)
    assert error["float16"] <= error["float32"] + step / 2 + 2**bits * 2.0**-25


@pytest.mark.parametrize("convention", SYMMETRIC + ASYMMETRIC)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_no_scale_underflows_to_zero(convention, scale_dtype):
    weight = np.asarray([0.0, 1e-9, -1e-6, 1e-5] * 8, np.float32)[:, None] * np.asarray([0.0, 1e-3, 1.0], np.float32)
    spec = QuantSpec(bits=8, group_size=32, symmetric=convention in SYMMETRIC, scale_dtype=scale_dtype)
    tensor = quantize_matrix(jnp.asarray(weight), None, spec, "rtn", RTNOptions(convention=convention))
    scales = np.asarray(tensor.scales, np.float32)
    assert (scales != 0).all()
    assert np.abs(scales).max() < 2e-7, "and none is raised to the smallest normal float16"


def test_a_weight_too_large_for_float16_scales_is_named():
    params = {"mlp": {"up_proj": {"kernel": jnp.full((32, 4), 3e5)}}}
    for dtype in ("bfloat16", "float32"):
        specs = {"block_2/mlp/up_proj": QuantSpec(bits=2, group_size=32, scale_dtype=dtype)}
        packed = quantize_part(params, "block_2", specs, Recipe())
        np.testing.assert_allclose(np.asarray(packed["mlp"]["up_proj"]["kernel"].dequantize()), 3e5, rtol=2.0**-8)
    specs = {"block_2/mlp/up_proj": QuantSpec(bits=2, group_size=32, scale_dtype="float16")}
    with pytest.raises(
        UserError, match=r"block_2/mlp/up_proj: weights too large for float16 scales; write scale_dtype"
    ):
        quantize_part(params, "block_2", specs, Recipe())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, symmetric):
    params = {"moe": {"experts": {"up_proj": {"kernel": jnp.ones((2, 64, 4), jnp.bfloat16).at[1, 40, 2].set(value)}}}}
    specs = {"block_2/moe/experts/up_proj": QuantSpec(bits=2, group_size=32, symmetric=symmetric)}
    with pytest.raises(UserError, match=r"^block_2/moe/experts/up_proj: a weight is NaN or infinite; [^\n]*$"):
        quantize_part(params, "block_2", specs, Recipe())


def test_the_short_last_group_has_its_own_range():
    weight = np.ones((40, 1), np.float32)
    weight[32:] = np.linspace(-1e-3, 1e-3, 8)[:, None]
    got = dequantized(weight, QuantSpec(bits=8, group_size=32, scale_dtype="float32"), clip="none")
    np.testing.assert_allclose(got, weight, atol=2e-3 / 255)


def test_a_stack_of_experts_is_quantized_expert_by_expert():
    weight = np.random.default_rng(0).standard_normal((3, 64, 8)).astype(np.float32)
    spec = QuantSpec(bits=3, group_size=32)
    stacked = quantize_matrix(jnp.asarray(weight), None, spec, "rtn", RTNOptions())
    assert isinstance(stacked, QTensor)
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(stacked.dequantize())[i], dequantized(weight[i], spec))


def test_compiles_once_for_matrices_of_one_shape(caplog):
    spec, options = QuantSpec(bits=2, group_size=32), RTNOptions()
    before = quantize_matrix._cache_size()
    for seed in range(4):
        quantize_matrix(jax.random.normal(jax.random.key(seed), (96, 12)), None, spec, "rtn", options)
    assert quantize_matrix._cache_size() == before + 1


def test_a_convention_that_does_not_fit_the_spec_is_refused():
    with pytest.raises(UserError, match="convention 'symr' does not fit asymmetric codes; write asym0 or asym"):
        RTNOptions(convention="symr").resolve(QuantSpec(bits=4))
