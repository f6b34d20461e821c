"""Half-quadratic quantization: against what the hqq package made of one layer, and closed forms of its step.

`fixtures/quantizers/README.md` says what is recorded. The package stores a zero point of any value; of these weights
every group has 0 in its range, so that none leaves [0, 2^bits].
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.errors import UserError
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.hqq import HQQOptions, hqq, optimize_zeros, shrink
from lq.quantizers.rtn import RTNOptions, rtn, split_groups

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parent.parent / "fixtures" / "quantizers" / "hqq.npz")
W = GOLDEN["W"].astype(np.float32).T
CASES = ["b2_g64", "b3_g64", "b4_g64", "b8_g64", "b4_g32", "b4_g128", "b2_g64_wide", "b2_g64_wide_v2"]


def setting(case):
    """Weights, spec, group size and options of a recorded case."""
    bits, group = int(case[1]), int(case.split("_")[1][1:])
    weight = 64 * W if "wide" in case else W
    second = {"kappa": 1.01, "keep": "best"} if case.endswith("v2") else {}
    spec = QuantSpec(bits=bits, group_size=group, scale_dtype="float32", zero_dtype="float32")
    return weight, spec, group, HQQOptions(round_zero=bits == 4, **second)


def run(weight, spec, options):
    """Codes, scales, zeros under jit, and the dequantized weight in float64."""
    parts = jax.jit(functools.partial(hqq, stats=None, spec=spec, options=options))(jnp.asarray(weight))
    return parts, dequantized(*parts, spec.group_length(len(weight)))


def dequantized(codes, scales, zeros, group):
    scales, zeros = (np.repeat(np.asarray(a, np.float64), group, 0)[: len(codes)] for a in (scales, zeros))
    return (np.asarray(codes, np.float64) - zeros) * scales


@pytest.mark.parametrize("case", CASES)
def test_equals_the_package(case):
    weight, spec, _, options = setting(case)
    (codes, scales, zeros), got = run(weight, spec, options)
    want_zeros = GOLDEN[f"{case}_zeros"].T
    np.testing.assert_allclose(np.asarray(scales).T, GOLDEN[f"{case}_scales"], rtol=2.0**-21)
    # A weight on a tie may fall to the other side, which moves its group's zero point by 1/g in the next step, and that
    # another weight: such groups go their own way, others keep float32 rounding of the zero point.
    apart = np.abs(np.asarray(zeros) - want_zeros) > 1e-4 * 2**spec.bits
    assert apart.mean() <= 0.02
    assert (np.asarray(codes) != GOLDEN[f"{case}_codes"].T).mean() <= 0.001
    assert np.abs(got - weight).mean() == pytest.approx(float(GOLDEN[f"{case}_mean_abs_err"]), rel=2e-4)
    error = np.linalg.norm(got - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(float(GOLDEN[f"{case}_relative_err"]), rel=3e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_step_has_the_package_s_error(case):
    weight, spec, _, options = setting(case)
    steps = GOLDEN[f"{case}_steps"]
    for made in (1, 2, 3, len(steps) - 1):
        fields = {"kappa": options.kappa, "round_zero": options.round_zero, "iterations": made, "early_stop": False}
        _, got = run(weight, spec, HQQOptions(**fields))
        # The weights are float16, so that some lie on a tie. A step itself reduces the error by 0.3 to 3 %.
        assert np.abs(got - weight).mean() == pytest.approx(float(steps[made]), rel=3e-4)
    assert steps[1] < 0.997 * steps[0]


@pytest.mark.parametrize("case", ["b2_g64", "b3_g64"])
def test_without_the_solver_it_is_rounding_to_nearest(case):
    weight, spec, group, _ = setting(case)
    codes, scales, zeros = rtn(jnp.asarray(weight), None, spec, RTNOptions(convention="asymf", clip="none"))
    np.testing.assert_allclose(np.asarray(scales).T, GOLDEN[f"{case}_plain_scales"], rtol=2.0**-21)
    np.testing.assert_allclose(np.asarray(zeros).T, GOLDEN[f"{case}_plain_zeros"], rtol=2.0**-20)
    # Four weights of 32,768, which lie on a tie to seven digits.
    assert (np.asarray(codes) != GOLDEN[f"{case}_plain_codes"].T).mean() <= 2e-4
    error = np.linalg.norm(dequantized(codes, scales, zeros, group) - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(float(GOLDEN[f"{case}_plain_relative_err"]), rel=1e-5)


def one_group(values, bits, **options):
    spec = QuantSpec(bits=bits, group_size=None, scale_dtype="float32", zero_dtype="float32")
    (codes, scales, zeros), _ = run(np.asarray(values, np.float32)[:, None], spec, HQQOptions(**options))
    return np.asarray(codes)[:, 0], float(scales[0, 0]), float(zeros[0, 0])


def test_one_step_by_hand():
    """s = 1/3, z = 0, q = 0 0 1 3. All errors are shrunk to zero, so z becomes the mean of q - W / s: 0, -.3, .4, 0."""
    codes, scale, zero = one_group([0, 0.1, 0.2, 1], bits=2, iterations=1)
    assert scale == pytest.approx(1 / 3, rel=1e-7)
    assert zero == pytest.approx(0.025, abs=1e-7)
    np.testing.assert_array_equal(codes, [0, 0, 1, 3])


def test_shrink_in_closed_form():
    x = np.asarray([-2.0, -0.1, 0.0, 0.1, 0.5, 2.0])
    np.testing.assert_allclose(shrink(jnp.asarray(x, jnp.float32), 10.0, 1.0), [-1.9, 0, 0, 0, 0.4, 1.9], atol=2e-7)
    want = np.sign(x) * np.maximum(np.abs(x) - np.where(x == 0, np.inf, np.abs(np.where(x == 0, 1, x)) ** -0.3) / 10, 0)
    got = np.asarray(shrink(jnp.asarray(x, jnp.float32), 10.0, 0.7))
    np.testing.assert_allclose(got, want, atol=2.0**-22)
    assert (got[np.abs(x) < 10 ** (-1 / 1.3)] == 0).all()


def test_with_all_errors_kept_the_zero_point_stays():
    """beta to infinity: E is the error itself, and the mean of q - (W - E) / s is z."""
    weight = np.random.default_rng(0).standard_normal((96, 8)).astype(np.float32)
    spec = QuantSpec(bits=3, group_size=32, scale_dtype="float32", zero_dtype="float32")
    scale, zero = (np.asarray(a)[:, None] for a in rtn(weight, None, spec, RTNOptions(clip="none"))[1:])
    grouped, real = split_groups(jnp.asarray(weight), spec)
    options = HQQOptions(beta=1e12, early_stop=False)
    moved = optimize_zeros(grouped, real, jnp.asarray(scale), jnp.asarray(zero), spec, options)
    # 20 steps, each of which rounds numbers below 8 in float32 and averages them.
    np.testing.assert_allclose(np.asarray(moved), zero, atol=20 * 8 * 2.0**-23)


def group_errors(weight, spec, options):
    return np.abs(run(weight, spec, options)[1] - weight).reshape(-1, spec.group_size, weight.shape[1]).mean(1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_what_each_rule_of_keeping_promises(bits):
    """None is worse than no solver; the best of a group is the best of every rule, group by group."""
    spec = QuantSpec(bits=bits, group_size=64, scale_dtype="float32", zero_dtype="float32")
    plain = (
        np.abs(dequantized(*rtn(W, None, spec, RTNOptions(clip="none")), 64) - W).reshape(-1, 64, W.shape[1]).mean(1)
    )
    error = {keep: group_errors(W, spec, HQQOptions(keep=keep)) for keep in ("last", "best", "best_in_group")}
    rounding = 1 + 1e-5  # of errors that were compared in float32
    assert (error["best_in_group"] <= plain * rounding).all()
    assert error["best_in_group"].mean() <= error["best"].mean() * rounding
    assert error["best"].mean() <= error["last"].mean() * rounding
    assert error["last"].mean() < plain.mean()


def test_figures_on_gaussian_weights():
    """Relative errors of the package with zero points that are not rounded first: .4294 .1836 .0856 .0050."""
    gauss = np.load(Path(__file__).parent.parent / "fixtures" / "quantizers" / "gptq_round_to_nearest.npz")["W"].T
    for bits, figure in ((2, 0.4294), (3, 0.1836), (4, 0.08564), (8, 0.005043)):
        spec = QuantSpec(bits=bits, group_size=64, scale_dtype="float32", zero_dtype="float32")
        _, got = run(gauss, spec, HQQOptions())
        # Half a unit of the fourth digit, and the groups that go their own way.
        assert np.linalg.norm(got - gauss) / np.linalg.norm(gauss) == pytest.approx(figure, rel=4e-4)


def in_float64(weight, bits, group, p=0.7, beta=10.0, iterations=20):
    """The zero points of the reference's solver, kept within [0, 2^bits]; the last group may be short."""
    top = 2**bits - 1
    groups = [g.astype(np.float64) for g in np.split(weight, range(group, len(weight), group))]
    scales = [(g.max(0) - g.min(0)) / top for g in groups]
    zeros = [-g.min(0) / s for g, s in zip(groups, scales, strict=True)]
    least = np.inf
    for _ in range(iterations):
        codes = [np.clip(np.round(g / s + z), 0, top) for g, s, z in zip(groups, scales, zeros, strict=True)]
        errors = [g - s * (q - z) for g, s, z, q in zip(groups, scales, zeros, codes, strict=True)]
        kept = [np.sign(e) * np.maximum(np.abs(e) - np.maximum(np.abs(e), 1e-99) ** (p - 1) / beta, 0) for e in errors]
        moved = [(q - (g - e) / s).mean(0) for g, s, q, e in zip(groups, scales, codes, kept, strict=True)]
        zeros = [np.clip(z, 0, 2**bits) for z in moved]
        mean = np.abs(np.concatenate(errors)).mean()
        if mean >= least:
            break
        least = mean
    return np.stack(zeros)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("deviation", [0.02, 1.0])
def test_equals_float64_with_a_short_last_group(bits, deviation):
    weight = (deviation * np.random.default_rng(4).standard_normal((112, 256))).astype(np.float32)
    weight[96:98] = [[-deviation], [deviation]]  # 0 is within the range of all groups, the last of 16 rows too
    spec = QuantSpec(bits=bits, group_size=32, scale_dtype="float32", zero_dtype="float32")
    (_, _, zeros), _ = run(weight, spec, HQQOptions())
    difference = np.abs(np.asarray(zeros) - in_float64(weight, bits, 32))
    # As against the package: a few groups with a weight near a tie go their own way.
    assert (difference[:3] > 1e-4 * 2**bits).mean() <= 0.02
    assert (difference[3] > 1e-4 * 2**bits).mean() <= 0.02


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("zero_dtype", ["bfloat16", "float16", "float32", None])
def test_codes_are_the_nearest_levels_of_the_stored_grid(scale_dtype, zero_dtype):
    weight = np.random.default_rng(1).standard_normal((100, 12)).astype(np.float32)
    spec = QuantSpec(bits=3, group_size=32, scale_dtype=scale_dtype, zero_dtype=zero_dtype)
    (codes, scales, zeros), got = run(weight, spec, HQQOptions())
    stored = np.asarray(QTensor.from_codes(codes, scales, zeros, spec).dequantize(), np.float64)
    np.testing.assert_allclose(stored, got, rtol=2.0**-22, err_msg="nothing is rounded once the codes are chosen")
    scale, zero = (np.repeat(np.asarray(a, np.float64), 32, 0)[:100] for a in (scales, zeros))
    nearest = np.abs((np.arange(8)[:, None, None] - zero) * scale - weight).min(0)
    np.testing.assert_allclose(np.abs(got - weight), nearest, atol=2.0**-22 * np.abs(weight).max())


def test_a_group_on_one_side_of_zero_stays_within_the_codes():
    weight = np.random.default_rng(2).uniform(1, 2, (128, 6)).astype(np.float32)
    weight[:, 3:] *= -1
    spec = QuantSpec(bits=4, group_size=64, zero_dtype="float32", scale_dtype="float32")
    (_, _, zeros), got = run(weight, spec, HQQOptions())
    assert 0 <= float(zeros.min()) <= float(zeros.max()) <= 16
    assert np.abs(got - weight).max() <= 2 / 15  # a step: half of one, and what z moved


def test_a_zero_point_rounded_to_a_code_gains_nothing():
    """Why a zero_dtype is advised."""
    error = {}
    for zero_dtype in (None, "bfloat16"):
        spec = QuantSpec(bits=3, group_size=64, zero_dtype=zero_dtype)
        error[zero_dtype] = np.linalg.norm(run(W, spec, HQQOptions())[1] - W)
    plain = dequantized(*rtn(W, None, QuantSpec(bits=3, group_size=64), RTNOptions(clip="none")), 64)
    assert error[None] == pytest.approx(np.linalg.norm(plain - W), rel=5e-3)
    assert error["bfloat16"] < 0.96 * error[None]


def test_experts_stop_each_at_its_own_step():
    stack = np.stack([W[:128, :16], 64 * W[128:, :16]])
    spec = QuantSpec(bits=2, group_size=64, scale_dtype="float32", zero_dtype="float32")
    stacked = hqq(jnp.asarray(stack), None, spec, HQQOptions())
    for i in range(2):
        for a, b in zip(stacked, hqq(jnp.asarray(stack[i]), None, spec, HQQOptions()), strict=True):
            np.testing.assert_allclose(np.asarray(a[i], np.float32), np.asarray(b, np.float32), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({}, {"symmetric": True}, "optimizes zero points, and symmetric codes have none; write symmetric: false"),
        ({"p": 1.2}, {}, "p: 1.2; write a number above 0, 1 at most"),
        ({"p": 0}, {}, "p: 0; write a number above 0, 1 at most"),
        ({"beta": 0.0}, {}, "beta: 0.0; write a number above 0"),
        ({"kappa": 0.99}, {}, "kappa: 0.99; write 1, or a number above"),
        ({"iterations": 0}, {}, "iterations: 0; write 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(options, spec, message):
    with pytest.raises(UserError, match=f"^hqq: {message}$"):
        HQQOptions(**options).check(QuantSpec(bits=4, **spec))
