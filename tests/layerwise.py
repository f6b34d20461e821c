"""One matrix with inputs whose channels are correlated and of uneven size, and its output error in float64."""

import jax.numpy as jnp
import numpy as np

from lq.calibration.statistics import InputStats, reduce_inputs
from lq.numerics.spec import QuantSpec


def weight_of(K: int, N: int, seed: int = 0, tail: int = 5) -> np.ndarray:
    """`[K, N]` float32 with the tails of Student's t."""
    return (0.05 * np.random.default_rng(seed).standard_t(tail, (K, N))).astype(np.float32)


def inputs_of(K: int, tokens: int = 400, seed: int = 1, factors: int = 8) -> np.ndarray:
    """`[tokens, K]` float64: common factors and noise, channels whose sizes differ by a factor of ten."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((tokens, factors)) @ rng.standard_normal((factors, K)) / 2
    return (common + rng.standard_normal((tokens, K))) * 10.0 ** rng.uniform(-0.5, 0.5, K)


def stats_of(x: np.ndarray) -> InputStats:
    return reduce_inputs(jnp.asarray(x, jnp.float32), frozenset({"hessian"}))


def dequantized(found, spec: QuantSpec) -> np.ndarray:
    """s (q - z) in float64, of what a quantizer returns."""
    codes, scales, zeros = (None if array is None else np.asarray(array, np.float64) for array in found)
    K, g = codes.shape[-2], spec.group_length(codes.shape[-2])
    per_channel = lambda array: np.repeat(array, g, axis=-2)[..., :K, :]  # noqa: E731
    return per_channel(scales) * (codes - (spec.zero_point if zeros is None else per_channel(zeros)))


def output_error(weight: np.ndarray, found, spec: QuantSpec, x: np.ndarray) -> float:
    """Sum of squares of x (W^ - W) over that of x W."""
    error = x @ (dequantized(found, spec) - weight.astype(np.float64))
    return float(np.square(error).sum() / np.square(x @ weight.astype(np.float64)).sum())
