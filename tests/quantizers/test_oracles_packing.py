"""Packed codes: against the words that GPTQModel, compressed-tensors and MLX write, and MLX's product with them.

The fixtures' README says what they are. Their matrices are `[out, in]`, ours `[in, out]`.
"""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq_kernels import pack, plane_widths, quantized_matmul
from lq_kernels.reference import error_scale

pytestmark = pytest.mark.once

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantizers"
MODEL, COMPRESSED = np.load(FIXTURES / "gptqmodel.npz"), np.load(FIXTURES / "compressed_tensors.npz")
MLX = np.load(FIXTURES / "mlx.npz")
GROUP = 64
BOTH_SIGNS = range(16)  # rows in which MLX's zero point is one of the codes


def of_32_codes(words, bits):
    """GPTQModel puts the words of all planes of 32 codes together: `[words, N]` -> one array per plane."""
    blocks = words.reshape(-1, bits, words.shape[1])
    ends = np.cumsum((0, *plane_widths(bits)))
    return [blocks[:, a:b].reshape(-1, words.shape[1]) for a, b in itertools.pairwise(ends)]


def codes_of_stream(words, bits):
    """Codes `[out, in]` of a bit stream without gaps, lowest bit first, in words `[out, words]`."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(words.shape[0], -1, bits)
    return np.packbits(whole, axis=2, bitorder="little")[..., 0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_are_those_of_gptqmodels_planar_files(bits):
    planes = pack(jnp.asarray(MODEL[f"pack_b{bits}_codes"]), bits)
    for got, want in zip(planes, of_32_codes(MODEL[f"pack_b{bits}_qweight"], bits), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_are_packed_as_in_gptqmodels_planar_files(bits):
    codes, zeros = (jnp.asarray(MODEL[f"pack_b{bits}_{key}"]) for key in ("codes", "zeros"))
    spec = QuantSpec(bits=bits, group_size=32)
    tensor = QTensor.from_codes(codes, jnp.ones(zeros.shape), zeros, spec)
    # Along the output channels: transposed, they are packed like weights.
    for got, want in zip(tensor.zeros, of_32_codes(MODEL[f"pack_b{bits}_qzeros"].T, bits), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want.T)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_words_of_one_plane_are_those_of_compressed_tensors(bits):
    (plane,) = pack(jnp.asarray(COMPRESSED[f"pack_b{bits}_codes"].T), bits)
    np.testing.assert_array_equal(np.asarray(plane).T, COMPRESSED[f"pack_b{bits}_words"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_one_plane_are_those_of_mlx(bits):
    words = MLX[f"b{bits}_g{GROUP}_words"]
    (plane,) = pack(jnp.asarray(codes_of_stream(words, bits).T), bits)
    np.testing.assert_array_equal(np.asarray(plane).T, words)


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_take_the_words_of_a_bit_stream_without_gaps(bits):
    """Of whole blocks of 32 codes; the last block of 80 codes is padded plane by plane."""
    codes = COMPRESSED[f"pack_b{bits}_codes"]
    np.testing.assert_array_equal(codes_of_stream(COMPRESSED[f"pack_b{bits}_words"], bits)[:, :80], codes)
    planes = pack(jnp.asarray(codes[:, :64].T), bits)
    assert sum(len(plane) for plane in planes) == 64 * bits // 32


def mlx_tensor(bits):
    """MLX's weights, read from its words: its bias is a whole number of scales below zero."""
    name = f"b{bits}_g{GROUP}"
    rows = np.asarray(BOTH_SIGNS)
    scales, biases = (MLX[f"{name}_{key}"][rows] for key in ("scales", "biases"))
    zeros = np.round(-biases / scales)
    np.testing.assert_allclose(zeros * scales, -biases, rtol=1e-6)
    codes = codes_of_stream(MLX[f"{name}_words"], bits)[rows]
    spec = QuantSpec(bits=bits, group_size=GROUP, scale_dtype="float32")
    return QTensor.from_codes(jnp.asarray(codes.T), jnp.asarray(scales.T), jnp.asarray(zeros.T.astype(np.uint32)), spec)


def test_dequantizes_mlxs_words_to_its_weights():
    want = MLX[f"b3_g{GROUP}_dequantized"][np.asarray(BOTH_SIGNS)].T
    # scale * code + bias there, scale * (code - zero) here, in float32: three roundings in all, and the terms of the
    # sum there are up to twice as large as the largest weight.
    bound = 3 * 2.0**-24 * 2 * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(mlx_tensor(3).dequantize()), want, rtol=0, atol=bound)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_error_of_mlxs_words_is_the_recorded_one(bits):
    """Of all rows: those whose zero point is no code too, with the bias."""
    name, W = f"b{bits}_g{GROUP}", MLX["W"].astype(np.float64)
    scales, biases = (np.repeat(MLX[f"{name}_{key}"].astype(np.float64), GROUP, axis=1) for key in ("scales", "biases"))
    result = scales * codes_of_stream(MLX[f"{name}_words"], bits) + biases
    assert np.linalg.norm(result - W) / np.linalg.norm(W) == pytest.approx(MLX[f"{name}_relative_err"], rel=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_product_is_that_of_mlx(bits):
    tensor, x = mlx_tensor(bits).packed(), jnp.asarray(MLX["X"].astype(np.float32))
    want = MLX[f"b{bits}_g{GROUP}_product"][:, np.asarray(BOTH_SIGNS)]
    got = np.asarray(quantized_matmul(x, tensor))
    # Both sum 256 float32 products: each is allowed what every product here is, 4e-6 of |x| @ |w|.
    assert (np.abs(got - want) <= 2 * 4e-6 * error_scale(x, tensor)).all()
