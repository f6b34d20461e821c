"""Every range convention and clipping search against float64 NumPy written from the formulas, and against the errors
that the packages which use it make on the same weights.

The pinned figures are relative Frobenius errors at groups of 64. The packages' own, on these weights: GPTQ's quantizer,
torchao and llm-compressor symmetric .5104 .2203 .1029 .0060 and asymmetric .4545 .1939 .0906 .0053; GPTQ's range search
.3785 .1900 .0954 .0060 and .3545 .1753 .0871 .0053; AutoRound symmetric .3928 .1911 .0949 .0059, its opt-RTN .3537
.1753 .0895 .0055; hqq without its solver and Quanto .4470 .1915 .0893 .0053; MLX .3928 .1894 .0908 .0053 (2, 3, 4, 8
bits).
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.rtn import SYMMETRIC, RTNOptions, rtn

pytestmark = pytest.mark.once

FIXTURES = Path(__file__).parent.parent / "fixtures" / "quantizers"  # its README.md says what is recorded
W = np.load(FIXTURES / "gptq_round_to_nearest.npz")["W"].T
K, N = W.shape
BITS, GROUP = (2, 3, 4, 8), 64

FIGURES = {
    ("symu", "none"): (0.5104, 0.2203, 0.1029, 0.006036),
    ("symu", "mse"): (0.3785, 0.1900, 0.09540, 0.005990),
    ("symr", "none"): (0.7174, 0.2507, 0.1075, 0.005903),
    ("symf", "none"): (0.3928, 0.1911, 0.09489, 0.005901),
    ("symf", "opt"): (0.3537, 0.1753, 0.08950, 0.005522),
    ("asym0", "none"): (0.4545, 0.1939, 0.09064, 0.005334),
    ("asym0", "mse"): (0.3545, 0.1753, 0.08709, 0.005334),
    ("asymf", "none"): (0.4470, 0.1915, 0.08930, 0.005253),
    ("asymf", "mse"): (0.3303, 0.1718, 0.08545, 0.005253),
    ("mlx", "none"): (0.3928, 0.1894, 0.09076, 0.005338),
}


def spec_for(convention, bits, **fields):
    symmetric = convention in SYMMETRIC
    zeros = {"zero_dtype": "float32"} if convention == "asymf" else {}
    return QuantSpec(
        **{"bits": bits, "group_size": GROUP, "symmetric": symmetric, "scale_dtype": "float32"} | zeros | fields
    )


def dequantized(weight, spec, stats=None, **options):
    codes, scales, zeros = rtn(jnp.asarray(weight), stats, spec, RTNOptions(**options))
    return np.asarray(QTensor.from_codes(codes, scales, zeros, spec).dequantize(), np.float64)


def reference(convention, clip, bits, importance=None):
    """W quantized in float64: each of the convention's groups by each candidate range, the best one kept."""
    x = W.astype(np.float64).reshape(-1, GROUP, N)
    h = np.ones(K) if importance is None else importance
    h = h.reshape(-1, GROUP, 1)
    factors, power = [1.0], 2.4
    if clip == "mse":
        factors += [1 - i / 100 for i in range(1, 80)]
    elif clip == "opt":
        step, reach = (0.005, 90) if bits == 2 else (0.0075, 100)
        factors += [1 / (1 - step * i) for i in range(-reach, reach + 1) if i]
        power = 2.0
    best, least = None, np.inf
    for p in factors:
        candidate = by_convention(convention, bits, x, p)
        loss = (h * np.abs(candidate - x) ** power).sum(1, keepdims=True)
        best = candidate if best is None else np.where(loss < least, candidate, best)
        least = np.minimum(loss, least)
    return best.reshape(K, N)


def by_convention(convention, bits, x, p):
    """s (clip(round(x / s) + z, 0, 2^b - 1) - z) with the convention's s and z for the range times p."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = p * x.min(1, keepdims=True), p * x.max(1, keepdims=True)
    extreme = np.where(high > -low, high, low)
    s, z = {
        "asym0": lambda: asymmetric(np.minimum(low, 0), np.maximum(high, 0), top, np.round),
        "asymf": lambda: asymmetric(low, high, top, lambda zero: zero),
        "mlx": lambda: mlx(low, high, top),
        "symu": lambda: (2 * np.abs(extreme) / top, middle),
        "symr": lambda: (np.abs(extreme) / (middle - 1), middle),
        "symf": lambda: (-extreme / middle, middle),
    }[convention]()
    return s * (np.clip(np.round(x / s + z) if convention == "asymf" else np.round(x / s) + z, 0, top) - z)


def asymmetric(low, high, top, rounded):
    s = (high - low) / top
    return s, rounded(-low / s)


def mlx(low, high, top):
    """The scale and bias of MLX's quantizer, its bias b as the zero point -b / s."""
    s = np.where(np.abs(low) > np.abs(high), 1, -1) * (high - low) / top
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    q0 = np.round(edge / s)
    assert (q0 != 0).all()
    return edge / q0, -q0


def relative_error(q):
    return np.linalg.norm(q - W) / np.linalg.norm(W.astype(np.float64))


def four_digits(value, figure):
    """Within 0.6 units of the fourth digit: half of one is the figure's rounding, the rest float32's."""
    return abs(value - figure) <= 0.6 * 10.0 ** (math.floor(math.log10(figure)) - 3)


@pytest.mark.parametrize(("convention", "clip"), FIGURES)
@pytest.mark.parametrize("bits", BITS)
def test_equals_float64_and_the_packages_error(convention, clip, bits):
    want = reference(convention, clip, bits)
    got = dequantized(W, spec_for(convention, bits), convention=convention, clip=clip)
    # float32 moves a weight only when it lies on a tie of rounding, which the extreme one of a group does in symu, or a
    # group when two of its ranges are equally good.
    ties = 1 / GROUP if convention == "symu" else 0
    assert (np.abs(got - want) > 1e-5 * np.abs(W).max()).mean() <= 0.004 + ties
    figure = FIGURES[convention, clip][BITS.index(bits)]
    assert four_digits(relative_error(want), figure)
    assert four_digits(relative_error(got), figure)


AUTO_ROUND = {
    "rtn_int_sym": ("symf", "none", (2, 3, 4, 8)),
    "opt_rtn_int_sym": ("symf", "opt", (2, 3, 4)),
    "int_asym": ("asym0", "none", (2, 3, 4, 8)),
    "int_sym_gptq": ("symu", "none", (2, 3, 4)),
}


@pytest.mark.parametrize(
    ("kind", "bits"), [(kind, bits) for kind, (*_, all_bits) in AUTO_ROUND.items() for bits in all_bits]
)
def test_equals_auto_round(kind, bits):
    golden, (convention, clip, _) = np.load(FIXTURES / "auto_round.npz"), AUTO_ROUND[kind]
    spec, options = spec_for(convention, bits, group_size=32), RTNOptions(convention=convention, clip=clip)
    weight = golden["rtn_W"].astype(np.float32)
    got = [None if a is None else np.asarray(a).T for a in rtn(jnp.asarray(weight.T), None, spec, options)]
    rows = slice(0, 32)
    if kind == "int_sym_gptq":  # it halves the scale of a group without negative weights, and clips the upper half
        rows = np.r_[0:16, 24:32]
    codes, scales, zeros = (golden[f"{kind}_b{bits}_g32_{part}"][rows] for part in ("codes", "scales", "zeros"))
    np.testing.assert_allclose(got[1][rows], scales, rtol=2.0**-22)
    np.testing.assert_array_equal(spec.zero_point if spec.symmetric else got[2][rows], zeros)
    # The weights are float16, and some lie on a tie; in symu the extreme one of a group does.
    assert (got[0][rows] != codes).mean() <= 0.001 + (1 / 32 if convention == "symu" else 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_equals_mlx(bits):
    golden = np.load(FIXTURES / "mlx.npz")
    weight = golden["W"].astype(np.float32)
    spec, options = spec_for("mlx", bits), RTNOptions(convention="mlx", clip="none")
    _, scales, zeros = (np.asarray(a, np.float64).T for a in rtn(jnp.asarray(weight.T), None, spec, options))
    want, biases = golden[f"b{bits}_g64_scales"], golden[f"b{bits}_g64_biases"]
    both_signs = slice(0, 16)
    np.testing.assert_allclose(scales[both_signs], want[both_signs], rtol=2.0**-22)
    np.testing.assert_allclose(zeros[both_signs], (-biases / want)[both_signs], rtol=2.0**-21)
    # On one side of zero MLX's zero point is past the codes; here the range goes to 0, its far end exact all the same.
    assert (np.abs(biases / want)[16:] >= 2**bits - 1).all()
    np.testing.assert_array_equal(zeros[16:], 2**bits - 1)
    np.testing.assert_allclose((-zeros * scales)[16:], biases[16:], rtol=2.0**-22)


@pytest.mark.parametrize("bits", [2, 4])
def test_opt_weighs_errors_with_the_mean_square_of_the_inputs(bits):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((512, K)) * np.exp(rng.normal(0, 1, K))).astype(np.float32)
    stats = InputStats(tokens=jnp.float32(512), square=jnp.asarray(np.square(x).sum(0)))
    importance = np.square(x.astype(np.float64)).sum(0)
    loss = lambda q: (importance[:, None] * np.square(q - W)).sum()  # noqa: E731
    spec = spec_for("symf", bits)
    weighed, even = (dequantized(W, spec, stats, clip="opt", importance=weigh) for weigh in (True, False))
    # Candidates whose losses tie in float32 may be exchanged, at no loss.
    assert loss(weighed) == pytest.approx(loss(reference("symf", "opt", bits, importance)), rel=1e-5)
    assert loss(weighed) < 0.95 * loss(even)
    np.testing.assert_array_equal(dequantized(W, spec, None, clip="opt"), even)


def test_opt_weighs_the_errors_of_each_expert_with_its_own_inputs():
    stack = jnp.asarray(np.stack([W[:64], W[64:128]]))
    squares = np.random.default_rng(6).exponential(1, (2, 64)) ** 2
    stats = InputStats(tokens=jnp.ones(2), square=jnp.asarray(squares, jnp.float32))
    spec, options = spec_for("symf", 3), RTNOptions(clip="opt", importance=True)
    stacked = rtn(stack, stats, spec, options)
    for i in range(2):
        own = InputStats(tokens=jnp.float32(1), square=stats.square[i])
        codes, scales, _ = rtn(stack[i], own, spec, options)
        np.testing.assert_array_equal(stacked[0][i], codes)
        np.testing.assert_array_equal(stacked[1][i], scales)
        assert (np.asarray(rtn(stack[i], None, spec, RTNOptions(clip="opt"))[1]) != np.asarray(scales)).any()


def test_importance_is_of_inputs_and_of_clip_opt_alone():
    options = RTNOptions(clip="opt", importance=True)
    with pytest.raises(UserError, match=r"^rtn: importance is that of the inputs; give calibration data, or write imp"):
        rtn(jnp.asarray(W), None, spec_for("symf", 3), options)
    with pytest.raises(
        UserError, match=r"^rtn: option importance: it weighs errors of clip opt, not mse; write clip: "
    ):
        RTNOptions(importance=True)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("clip", ["none", "mse", "opt"])
def test_zero_points_of_asymf_are_within_the_codes_and_as_stored(bits, zero_dtype, clip):
    weight = np.random.default_rng(bits).standard_normal((96, 24)).astype(np.float32)
    weight[:, :8] += 6.0  # above zero, and below it, far and near
    weight[:, 8:12] -= 6.0
    weight[:, 12:16] -= weight[:, 12:16].max(0) + 1e-3
    spec = QuantSpec(bits=bits, group_size=32, zero_dtype=zero_dtype)
    zeros = rtn(jnp.asarray(weight), None, spec, RTNOptions(clip=clip))[2]
    assert zeros.dtype == jnp.float32
    assert zeros.min() >= 0
    assert zeros.max() <= 2**bits
    np.testing.assert_array_equal(np.asarray(zeros.astype(zero_dtype), np.float32), np.asarray(zeros))
    assert (np.asarray(zeros) % 1 != 0).any()


@pytest.mark.parametrize("convention", ["asym0", "asymf", "mlx"])
@pytest.mark.parametrize("offset", [-5.0, -1.001, 1.001, 5.0])
def test_a_group_on_one_side_of_zero_keeps_both_its_ends(convention, offset):
    """Its own zero point would lie outside the codes; half a step of the range to zero is the most it can be off."""
    weight = (np.linspace(-1, 1, 64) + offset).astype(np.float32)[:, None]
    spec = spec_for(convention, 4)
    error = np.abs(dequantized(weight, spec, convention=convention, clip="none") - weight)
    assert error.max() <= (1 + abs(offset)) / 15 / 2 * (1 + 1e-5)


def test_asym_loses_the_far_end_of_a_group_on_one_side_of_zero():
    weight = np.linspace(1, 2, 64, dtype=np.float32)[:, None]  # s = 1/3, z = clip(-3): no code stands for more than 1
    got = dequantized(weight, spec_for("asym", 2), convention="asym", clip="none")
    np.testing.assert_allclose(got, 1.0, rtol=1e-6)


def test_a_zero_point_past_the_last_code_needs_no_longer_range():
    """Weights from -1 to -0.01 in 2 bits: s = .33, z = 3.03. A code stands for each end."""
    weight = np.asarray([-1.0, -0.67, -0.34, -0.01] * 16, np.float32)[:, None]
    got = dequantized(weight, spec_for("asymf", 2), clip="none")
    np.testing.assert_allclose(got, weight, atol=1e-6)


@pytest.mark.parametrize("convention", ["asym0", "asym", "mlx"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_whole_zero_points_are_the_same_in_a_dtype_of_their_own(convention, bits):
    options = RTNOptions(convention=convention)
    codes = rtn(jnp.asarray(W), None, QuantSpec(bits=bits), options)
    for dtype in ("bfloat16", "float16", "float32"):
        for a, b in zip(codes, rtn(jnp.asarray(W), None, QuantSpec(bits=bits, zero_dtype=dtype), options), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_the_default_convention_follows_the_zero_points():
    resolved = lambda **fields: RTNOptions().resolve(QuantSpec(bits=4, **fields))  # noqa: E731
    assert resolved() == "asym0"
    assert resolved(symmetric=True) == "symf"
    assert resolved(zero_dtype="bfloat16") == "asymf"


def test_fractional_zero_points_need_a_dtype():
    with pytest.raises(UserError, match=r"^rtn: convention 'asymf' has zero points that are no codes; write [^\n]+$"):
        RTNOptions(convention="asymf").resolve(QuantSpec(bits=4))
