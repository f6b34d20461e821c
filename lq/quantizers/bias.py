"""Bias correction: the mean error that quantization leaves in the outputs of a matrix, taken off by its bias.

For y = x W + b and the quantized y' = x W' + b' the mean of y' - y over the calibration tokens is zero in every output
channel when b' = b + mean(x) (W - W').

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, section
4.2, with the mean of x measured.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.statistics import HIGHEST, InputStats


def bias_correction(
    weight: Float[Array, "... K N"], dequantized: Float[Array, "... K N"], stats: InputStats
) -> Float[Array, "... N"]:
    """What to add to the bias, float32. Pure and jittable; leading axes are a stack of experts.

    An expert that no token was sent to gets none. Raises ValueError when `stats.total` was not collected.
    """
    error = weight.astype(jnp.float32) - dequantized.astype(jnp.float32)
    return jnp.einsum("...k,...kn->...n", stats.mean, error, precision=HIGHEST)
