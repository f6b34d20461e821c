"""Packed tensors of random codes, and what they stand for in float64, weight by weight."""

import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (names bfloat16 for NumPy)
import numpy as np

from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec


def random_qtensor(spec: QuantSpec, shape, seed=0):
    """A tensor, and the codes, scales and zeros it was made of; with the residual of `random_residual` at a rank."""
    rng = np.random.default_rng(seed)
    *lead, K, N = shape
    groups = (*lead, spec.num_groups(K), N)
    codes = rng.integers(0, spec.max_code + 1, shape)
    scales = rng.uniform(0.5, 2.0, groups).astype(spec.scale_dtype)
    zeros = None if spec.symmetric else rng.integers(0, spec.max_code + 1, groups)
    if spec.zero_dtype is not None:
        zeros = rng.uniform(0, 2**spec.bits, groups).astype(spec.zero_dtype)
    packed_zeros = None if zeros is None else jnp.asarray(zeros)
    residual = random_residual(spec, shape, seed)[0] if spec.rank else None
    tensor = QTensor.from_codes(jnp.asarray(codes), jnp.asarray(scales), packed_zeros, spec, residual)
    return tensor, (codes, scales, zeros)


def random_residual(spec: QuantSpec, shape, seed=0):
    """The packed factors, and their float64 product `[..., K, N]`; scales such that it is as large as the weight."""
    packed, dense = [], []
    for i, (factor_spec, factor_shape) in enumerate(spec.residual(shape)):
        factor, parts = random_qtensor(factor_spec, factor_shape, seed + 100 * (i + 1))
        scales = (parts[1].astype(np.float64) * 2.0**-6).astype(factor_spec.scale_dtype)
        packed.append(factor.replace(scales=jnp.asarray(scales)))
        dense.append(dequantize_by_definition(parts[0], scales, None, factor_spec))
    return tuple(packed), dense[0] @ dense[1]


def dequantize_by_definition(codes, scales, zeros, spec: QuantSpec):
    """(code - zero) * scale in float64, weight by weight. The residual is left out."""
    *lead, K, _ = codes.shape
    g = spec.group_size or K
    out = np.empty(codes.shape, np.float64)
    constant = 2 ** (spec.bits - 1) if spec.bits > 1 else 0.5
    for index in np.ndindex(*lead):
        for k in range(K):
            zero = constant if zeros is None else zeros[index][k // g].astype(np.float64)
            out[index][k] = (codes[index][k].astype(np.float64) - zero) * scales[index][k // g].astype(np.float64)
    return out
