"""The canonical layout, against a definition written bit by bit in plain Python integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lq_kernels import pack, packed_bits, plane_widths, unpack, words_along

pytestmark = pytest.mark.once

WIDTHS = range(1, 9)


def codes_of(bits, K, N, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, (K, N)).astype(np.uint32)


def planes_by_definition(codes, bits):
    """Every bit of every code put where the layout says, one at a time."""
    K, N = codes.shape
    planes, low = [], 0
    for width in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]:
        per_word = 32 // width
        words = [[0] * N for _ in range((K + per_word - 1) // per_word)]
        for k in range(K):
            for n in range(N):
                field = (int(codes[k, n]) >> low) & ((1 << width) - 1)
                words[k // per_word][n] |= field << (width * (k % per_word))
        planes.append(np.asarray(words, np.uint32).reshape(-1, N))
        low += width
    return planes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(64, 3), (33, 2), (1, 1), (100, 5)])
def test_words_are_the_defined_ones(bits, shape):
    codes = codes_of(bits, *shape)
    packed = pack(codes, bits)
    expected = planes_by_definition(codes, bits)
    assert len(packed) == len(expected)
    for got, want in zip(packed, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 130), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_round_trip_for_every_width_and_ragged_length(bits, K, N, seed):
    codes = codes_of(bits, K, N, seed)
    np.testing.assert_array_equal(np.asarray(unpack(pack(codes, bits), bits, K)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_stack_packs_like_its_members(bits):
    stack = np.stack([codes_of(bits, 40, 3, seed) for seed in range(4)])
    packed = pack(stack, bits)
    for i, member in enumerate(stack):
        for plane, alone in zip(packed, pack(member, bits), strict=True):
            np.testing.assert_array_equal(np.asarray(plane[i]), np.asarray(alone))
    np.testing.assert_array_equal(np.asarray(unpack(packed, bits, 40)), stack)


@pytest.mark.parametrize("bits", WIDTHS)
def test_b_bits_cost_b_bits_when_the_length_is_a_multiple_of_32(bits):
    assert packed_bits((96, 7), bits) == bits * 96 * 7


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("K", [1, 31, 33, 100])
def test_accounting_equals_the_words_made(bits, K):
    words = sum(plane.size for plane in pack(codes_of(bits, K, 5), bits))
    assert packed_bits((K, 5), bits) == 32 * words


@pytest.mark.parametrize("bits", WIDTHS)
def test_cutting_the_input_axis_at_32_cuts_between_words(bits):
    codes = codes_of(bits, 128, 4)
    whole = pack(codes, bits)
    for start in range(0, 128, 32):
        part = pack(codes[start : start + 32], bits)
        for plane, own, width in zip(whole, part, plane_widths(bits), strict=True):
            rows = words_along(32, width)
            first = words_along(start, width)
            np.testing.assert_array_equal(np.asarray(plane[first : first + rows]), np.asarray(own))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(np.zeros((4, 4), np.uint32), bits)
