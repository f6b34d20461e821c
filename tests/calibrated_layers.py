"""Layers with inputs, and the sweep of GPTQ in float64 as the paper has it: what calibrated quantizers are held to."""

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.statistics import InputStats, reduce_inputs
from lq.numerics.spec import QuantSpec
from lq.quantizers.gptq import GPTQOptions, gptq


def correlated_inputs(tokens: int, channels: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """float32 `[tokens, channels]`: mixed channels, of standard deviations exp(spread * normal)."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(channels) + 0.5 * rng.standard_normal((channels, channels)) / np.sqrt(channels)
    scales = np.exp(spread * rng.standard_normal(channels))
    return (rng.standard_normal((tokens, channels)) @ mixing * scales).astype(np.float32)


def inputs_with_common_factors(tokens: int, channels: int, seed: int = 1, factors: int = 8) -> np.ndarray:
    """float64 `[tokens, channels]`: common factors and noise, channels whose sizes differ by a factor of ten."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((tokens, factors)) @ rng.standard_normal((factors, channels)) / 2
    return (common + rng.standard_normal((tokens, channels))) * 10.0 ** rng.uniform(-0.5, 0.5, channels)


def random_weight(*shape: int, seed: int = 1, freedom: int = 5) -> np.ndarray:
    """float32, with the tails of Student's t."""
    return np.random.default_rng(seed).standard_t(freedom, shape).astype(np.float32)


def hessian_stats(inputs: np.ndarray) -> InputStats:
    """What a quantizer of the second moment gets of `[tokens, K]`, or of a stack of experts' `[E, tokens, K]`."""
    reduce = lambda x: reduce_inputs(x, frozenset({"hessian"}))  # noqa: E731
    x = jnp.asarray(inputs, jnp.float32)
    return reduce(x) if x.ndim == 2 else jax.vmap(reduce)(x)


def per_channel(of_groups, channels: int, group: int) -> np.ndarray:
    """`[groups, N]` as float64 `[channels, N]`."""
    return np.repeat(np.asarray(of_groups, np.float64), group, axis=0)[:channels]


def dequantized_float64(found, spec: QuantSpec) -> np.ndarray:
    """s (q - z), of the codes `[..., K, N]`, scales and zero points that a quantizer returns."""
    codes, scales, zeros = (None if array is None else np.asarray(array, np.float64) for array in found)
    K, g = codes.shape[-2], spec.group_length(codes.shape[-2])
    rows = lambda array: np.repeat(array, g, axis=-2)[..., :K, :]  # noqa: E731
    return rows(scales) * (codes - (spec.zero_point if zeros is None else rows(zeros)))


def gptq_codes(weight, stats, spec, options=GPTQOptions()):  # noqa: B008, frozen
    """Codes, scales and zero points of GPTQ, under jit, as float64; zero points of symmetric codes too."""
    codes, scales, zeros = jax.jit(gptq, static_argnames=("spec", "options"))(jnp.asarray(weight), stats, spec, options)
    if zeros is None:
        zeros = jnp.full_like(scales, spec.zero_point)
    return tuple(np.asarray(a, np.float64) for a in (codes, scales, zeros))


def codes_in_float64(weight, hessian, damping, order, scale, zero, top) -> np.ndarray:
    """GPTQ's codes `[K, N]`, by the recurrence of the paper: U with U^T U = (H + damping I)^-1, and no shortcuts.

    Args:
      weight: `[K, N]`.
      hessian: H, without damping.
      damping: added to its diagonal.
      order: the channels in the order of the sweep.
      scale, zero, top: of every channel, `[K, N]` or what broadcasts to it; codes are 0 to `top`.
    """
    K = len(weight)
    damped = np.asarray(hessian, np.float64)[np.ix_(order, order)] + damping * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    weight = np.asarray(weight, np.float64)[order]
    scale, zero, top = (np.broadcast_to(a, weight.shape)[order] for a in (scale, zero, top))
    codes = np.zeros_like(weight)
    for k in range(K):
        codes[k] = np.clip(np.round(weight[k] / scale[k] + (zero[k] % 1)) + zero[k] // 1, 0, top[k])
        error = (weight[k] - scale[k] * (codes[k] - zero[k])) / upper[k, k]
        weight[k:] -= np.outer(upper[k, k:], error)
    original = np.empty_like(codes)
    original[order] = codes
    return original


def output_error_float64(weight, dequantized, inputs) -> float:
    """||X (W - Q)||^2 / ||X W||^2"""
    x, weight = np.asarray(inputs, np.float64), np.asarray(weight, np.float64)
    return float(np.square(x @ (weight - dequantized)).sum() / np.square(x @ weight).sum())


def output_error_of_codes(weight, found, spec: QuantSpec, inputs) -> float:
    """The same, of what a quantizer returns."""
    return output_error_float64(weight, dequantized_float64(found, spec), inputs)
