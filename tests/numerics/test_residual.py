"""A `QTensor` with a low-rank residual, (code - zero) scale + left right, wherever a weight is used or counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_qtensors import dequantize_by_definition, random_qtensor, random_residual

from lq.numerics.matmul import lookup, matmul
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec

pytestmark = pytest.mark.once

SHAPES = [(128, 24), (100, 7), (33, 40), (2, 96, 24)]
SPECS = [
    QuantSpec(bits=bits, group_size=32, rank=rank, **fields)
    for bits, rank in [(1, 1), (3, 8), (4, 32), (8, 500)]
    for fields in ({}, {"symmetric": True, "scale_dtype": "float32"}, {"zero_dtype": "float16"})
]


def dense_of(spec, shape, seed=0):
    """A random tensor, its float64 weight, and the float64 product of the magnitudes of its factors' entries."""
    tensor, parts = random_qtensor(spec, shape, seed)
    left, right = (np.abs(np.asarray(factor.dequantize(), np.float64)) for factor in tensor.residual)
    return tensor, dequantize_by_definition(*parts, spec) + random_residual(spec, shape, seed)[1], left @ right


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accounting_equals_the_bytes_on_the_device(spec, shape):
    tensor, _ = random_qtensor(spec, shape)
    measured = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tensor))
    assert measured == tensor.nbytes == spec.size_bits(shape) // 8
    assert tensor.bits_per_weight == spec.bits_per_weight(shape) == 8 * measured / math.prod(shape)


def test_size_in_closed_form():
    """rank r of 8-bit factors: 8 r (K + N) bits and a 16-bit scale per component and per output channel."""
    K, N, r = 256, 512, 8
    plain, compensated = (QuantSpec(bits=2, rank=rank).size_bits((K, N)) for rank in (0, r))
    assert compensated - plain == 8 * r * (K + N) + 16 * (r + N)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weight_is_codes_and_product(spec, shape):
    tensor, dense, magnitude = dense_of(spec, shape)
    # Of the codes three roundings at most; of a sum of r products r of the products' magnitudes, and the last sum.
    rank = tensor.residual[0].shape[-1]
    bound = 2.0**-24 * ((rank + 4) * magnitude + 4 * np.abs(dense) + 4 * magnitude)
    assert (np.abs(np.asarray(tensor.dequantize(), np.float64) - dense) <= bound).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("jitted", [False, True])
def test_matmul_equals_the_product_in_float64(spec, jitted):
    tensor, dense, magnitude = dense_of(spec, (96, 40))
    x = np.random.default_rng(3).standard_normal((4, 96)).astype(np.float32)
    got = np.asarray((jax.jit(matmul) if jitted else matmul)(x, tensor), np.float64)
    # Kernels stay within 4e-6 of |x| |w|, or of |x| (|w| + 2^b s) where they take zero points off after the sum; s is
    # below 2. Two of them follow each other in the residual.
    inputs = np.abs(x).astype(np.float64)
    bound = 4e-6 * inputs @ (np.abs(dense) + 2 * 2.0**spec.bits + 2 * magnitude + residual_offset(tensor))
    assert (np.abs(got - x.astype(np.float64) @ dense) <= bound).all()


def residual_offset(tensor):
    """What 2^b s of the factors amounts to in their product."""
    left, right = tensor.residual
    scales = [np.abs(np.asarray(f.scales, np.float64)) * 256 for f in (left, right)]
    magnitudes = [np.abs(np.asarray(f.dequantize(), np.float64)) for f in (left, right)]
    return scales[0] @ magnitudes[1] + (magnitudes[0] + scales[0]).sum(1, keepdims=True) * scales[1]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_lookup_gives_the_columns_of_the_weight(spec):
    tensor, dense, magnitude = dense_of(spec, (96, 50))
    rows = np.asarray([[3, 49], [0, 3]])
    got = np.asarray(lookup(tensor, jnp.asarray(rows)), np.float64)
    rank = tensor.residual[0].shape[-1]
    bound = 2.0**-24 * ((rank + 8) * magnitude + 4 * np.abs(dense) + 4 * magnitude)
    assert (np.abs(got - dense.T[rows]) <= bound.T[rows]).all()


def test_goes_through_jit_tree_map_and_eval_shape():
    tensor, _ = random_qtensor(QuantSpec(bits=3, group_size=32, rank=4), (96, 16))
    doubled = jax.jit(lambda t: t.replace(scales=2 * t.scales))(tensor)
    assert doubled.residual[0].spec == tensor.residual[0].spec
    abstract = jax.eval_shape(lambda t: t, tensor)
    assert abstract.nbytes == tensor.nbytes
    assert jax.tree.structure(abstract) == jax.tree.structure(jax.tree.map(lambda a: a, tensor))
    assert len(jax.tree.leaves(tensor)) == len(jax.tree.leaves(tensor.replace(residual=None))) + 2 * 2


def test_the_residual_must_fit_the_spec():
    codes, scales = jnp.zeros((32, 4), jnp.uint32), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="needs a low-rank residual"):
        QTensor.from_codes(codes, scales, None, QuantSpec(bits=4, symmetric=True, rank=2))
    residual = random_residual(QuantSpec(bits=4, rank=2), (32, 4))[0]
    with pytest.raises(ValueError, match="has no low-rank residual"):
        QTensor.from_codes(codes, scales, None, QuantSpec(bits=4, symmetric=True), residual)
    with pytest.raises(ValueError, match=r"factors int8-column-sym \(32, 3\) and .*, not int8-column-sym \(32, 2\)"):
        QTensor.from_codes(codes, scales, None, QuantSpec(bits=4, symmetric=True, rank=3), residual)
