"""Round to nearest: against what AutoRound and compressed-tensors compute with each convention.

The fixtures' README says what they are. Their matrices are `[out, in]`, ours `[in, out]`.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lq.numerics.spec import QuantSpec
from lq.quantizers.rtn import RTNOptions, rtn

pytestmark = pytest.mark.once

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantizers"
AUTO_ROUND, COMPRESSED = np.load(FIXTURES / "auto_round.npz"), np.load(FIXTURES / "compressed_tensors.npz")
WEIGHT = COMPRESSED["W"].astype(np.float32)
# In rows 16 to 23 every weight is positive and in rows 24 to 31 every weight is negative.
BOTH_SIGNS, NEGATIVE = range(16), range(24, 32)
ALL_ROWS = range(32)


def rounded(weight, bits, group, convention):
    """Codes `[out, in]`, scales and zeros `[out, groups]` of a weight `[out, in]`, as float64."""
    symmetric = convention in ("symu", "symr", "symf")
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="float32")
    codes, scales, zeros = rtn(jnp.asarray(weight.T), None, spec, RTNOptions(convention=convention, clip="none"))
    zeros = np.full(scales.shape, spec.zero_point) if zeros is None else zeros
    return tuple(np.asarray(a, np.float64).T for a in (codes, scales, zeros))


def dequantized(codes, scales, zeros):
    group = codes.shape[1] // scales.shape[1]
    return np.repeat(scales, group, axis=1) * (codes - np.repeat(zeros, group, axis=1))


def assert_equal_but_for_ties(got, want, exact, bits):
    """Whole numbers rounded from `exact` are equal, or `exact` is half-way between two and they are its neighbours.

    The quotient w / scale is of a scale that took two roundings in float32 and is rounded itself: both programs have it
    to 3 * 2^-24 of itself, so that they are within 2^-21 of each other relative to the largest code.
    """
    different = got != want
    tie = np.abs(exact - np.floor(exact) - 0.5) <= 2.0**-21 * 2**bits
    assert (~different | tie).all()
    assert np.abs(got - want).max() <= 1


def assert_same_rounding(weight, recorded, name, bits, group, convention, rows=ALL_ROWS):
    rows = np.asarray(rows)
    codes, scales, zeros = (a[rows] for a in rounded(weight, bits, group, convention))
    want_scales = recorded[f"{name}_scales"].astype(np.float64)[rows]
    np.testing.assert_allclose(scales, want_scales, rtol=2.0**-22)  # two roundings in either program
    want_zeros = np.full(scales.shape, 2.0 ** (bits - 1))
    if f"{name}_zeros" in recorded:
        want_zeros = recorded[f"{name}_zeros"].astype(np.float64)[rows]
    np.testing.assert_array_equal(zeros, want_zeros)
    want = recorded[f"{name}_codes"].astype(np.float64)[rows]
    quotients = weight[rows].astype(np.float64) / np.repeat(want_scales, group, axis=1)
    assert_equal_but_for_ties(codes, want, quotients, bits)
    return dequantized(codes, scales, zeros)


def assert_same_error(result, recorded, name, bits):
    """Both neighbours of a tie are equally far. A scale that is off by 2^-22 of itself moves a weight by at most
    2^(bits - 22) steps, and rounding is off by 0.29 steps in the mean."""
    exact = WEIGHT.astype(np.float64)
    error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(recorded[f"{name}_relative_err"], rel=2.0 ** (bits - 20))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symf_is_auto_rounds_signed_full_range(bits):
    name = f"rtn_int_sym_b{bits}_g32"
    result = assert_same_rounding(WEIGHT, AUTO_ROUND, name, bits, 32, "symf")
    assert_same_error(result, AUTO_ROUND, name, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("recorded", "name"), [(AUTO_ROUND, "int_asym"), (COMPRESSED, "asym")])
def test_asym0_is_the_asymmetric_range_of_auto_round_and_compressed_tensors(recorded, name, bits):
    name = f"{name}_b{bits}_g32"
    result = assert_same_rounding(WEIGHT, recorded, name, bits, 32, "asym0")
    assert_same_error(result, recorded, name, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symu_is_the_symmetric_range_of_compressed_tensors(bits):
    name = f"sym_b{bits}_g32"
    result = assert_same_rounding(WEIGHT, COMPRESSED, name, bits, 32, "symu")
    assert_same_error(result, COMPRESSED, name, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows", [BOTH_SIGNS, NEGATIVE], ids=["both signs", "negative"])
def test_symu_is_the_symmetric_range_of_gptq_where_a_group_has_negative_weights(bits, rows):
    assert_same_rounding(WEIGHT, AUTO_ROUND, f"int_sym_gptq_b{bits}_g32", bits, 32, "symu", rows)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symu_keeps_the_whole_range_of_groups_without_negative_weights_and_gptq_half_of_it(bits):
    positive, name = np.arange(16, 24), f"int_sym_gptq_b{bits}_g32"
    ours = [a[positive] for a in rounded(WEIGHT, bits, 32, "symu")]
    theirs = [AUTO_ROUND[f"{name}_{key}"][positive].astype(np.float64) for key in ("codes", "scales", "zeros")]
    np.testing.assert_allclose(ours[1], 2 * theirs[1], rtol=2.0**-22)
    largest = WEIGHT[positive].reshape(8, 8, 32).max(-1)
    for (codes, scales, zeros), steps_off in ((ours, 0.5), (theirs, 2 ** (bits - 1))):
        represented = dequantized(codes, scales, zeros).reshape(8, 8, 32).max(-1)
        np.testing.assert_allclose(largest - represented, steps_off * scales, rtol=1e-4)


def test_asym_and_asym0_differ_only_where_zero_is_outside_the_range():
    raw, with_zero = rounded(WEIGHT, 4, 32, "asym"), rounded(WEIGHT, 4, 32, "asym0")
    for a, b in zip(raw, with_zero, strict=True):
        np.testing.assert_array_equal(a[BOTH_SIGNS], b[BOTH_SIGNS])
    assert (raw[1][16:] < with_zero[1][16:]).all()
