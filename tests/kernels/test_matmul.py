"""`quantized_matmul` against float64 NumPy on the dequantized matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq_kernels import PackedMatrix, pack, quantized_matmul


def make(bits, K, N, group, symmetric=False, seed=0):
    """A packed matrix and the float64 matrix it stands for, by the definition in `PackedMatrix`."""
    rng = np.random.default_rng(seed)
    groups = -(-K // group)
    codes = rng.integers(0, 1 << bits, (K, N)).astype(np.uint32)
    scales = rng.uniform(0.5, 1.5, (groups, N)).astype(np.float32)
    zeros = None if symmetric else rng.integers(0, 1 << bits, (groups, N)).astype(np.uint32)
    middle = float(1 << (bits - 1)) if bits > 1 else 0.5
    packed = PackedMatrix(
        planes=pack(codes, bits),
        scales=jnp.asarray(scales),
        zeros=None if zeros is None else jnp.asarray(zeros),
        zero_point=middle,
        bits=bits,
        group_size=group,
        in_features=K,
    )
    g = np.arange(K) // group
    zero = np.float64(middle) if zeros is None else zeros.astype(np.float64)[g]
    return packed, (codes.astype(np.float64) - zero) * scales.astype(np.float64)[g]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("K", "group"), [(128, 32), (100, 64), (256, 256)])
def test_product_equals_float64(bits, symmetric, K, group):
    w, dense = make(bits, K, 24, group, symmetric)
    x = np.random.default_rng(1).standard_normal((3, 5, K)).astype(np.float32)
    got = np.asarray(jax.jit(quantized_matmul)(x, w), np.float64)
    want = x.astype(np.float64) @ dense
    # A float32 dot of length K: at most K roundings of 2^-24 relative to sum |x||w|, one more for each dequantized
    # weight.
    bound = (K + 2) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(dense))
    assert (np.abs(got - want) <= bound).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_activations_keep_their_dtype(dtype):
    w, dense = make(4, 128, 16, 32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((7, 128)), dtype)
    got = quantized_matmul(x, w)
    assert got.dtype == dtype
    x64 = np.asarray(x, np.float64)
    # Two roundings to the dtype (weight, result) and float32 accumulation in between.
    bound = 2.1 * float(jnp.finfo(dtype).eps) * (np.abs(x64) @ np.abs(dense))
    assert (np.abs(np.asarray(got, np.float64) - x64 @ dense) <= bound).all()
    assert quantized_matmul(x, w, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    w, _ = make(3, 64, 8, 32)
    assert quantized_matmul(jnp.zeros((rows, 64)), w).shape == (rows, 8)


def test_gradient_flows_to_the_activations():
    w, dense = make(4, 64, 8, 32)
    grad = jax.grad(lambda x: quantized_matmul(x, w).sum())(jnp.ones((2, 64)))
    np.testing.assert_allclose(np.asarray(grad), np.broadcast_to(dense.sum(1), (2, 64)), rtol=1e-5)


def test_wrong_channel_count_is_refused():
    w, _ = make(4, 64, 8, 32)
    with pytest.raises(ValueError, match="for a matrix of 64 input channels"):
        quantized_matmul(jnp.ones((2, 63)), w)


def test_unknown_backend_is_refused():
    w, _ = make(4, 64, 8, 32)
    with pytest.raises(ValueError, match="no backend is called 'cuda'; known: "):
        quantized_matmul(jnp.ones((2, 64)), w, backend="cuda")
