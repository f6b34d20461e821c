"""Unit gain: scales that give back what rounding takes from the size of the outputs.

Of all grids the one of least error gives back less than it was given: its error is orthogonal to what is left,

    <Q, Q - W> = 0    so that    <W, Q> = <Q, Q> = <W, W> - |Q - W|^2,

and Q = g W + (what is uncorrelated with W), the gain g being one less the share of energy that is lost: 0.9 at 2 bits,
2 / pi at 1, of normally distributed weights. In a network that is no noise. Every matrix has it, in the same direction
for every token, and while errors that know nothing of each other add their squares, these add up: the residual stream
gets too little of every block. Scales times 1 / g,

    <W, W> / <W, Q>,

give every output back its size. The error of the matrix alone grows by it, by the factor 1 / g; what the model loses
falls: in 2.5 bits per weight by a fifth of what GPTQ loses, by half of what plain rounding does, where one-bit matrices
are among them (`experiments/allocation`).

The gain of random inputs is Bussgang's (1952). The same factor makes one-bit quantization unbiased in DRIVE (Vargaftik
et al., arXiv 2105.08339) and EDEN (arXiv 2108.08842), where many vectors are averaged; here it is in the metric of the
inputs, and layers after one another are what adds up.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

MOST = 2.0  # a group that has less than half its size left is not the same times a number


def unit_gain(
    original: Float[Array, "... K N"], rounded: Float[Array, "... K N"], energy: Float[Array, "... K 1"] | float = 1.0
) -> Float[Array, "... 1 N"]:
    """<w, w> / <w, q> of every output channel, from 1 / `MOST` to `MOST`; 1 of what is zero.

    Args:
      original, rounded: what the inner products are of, float32.
      energy: of every input channel, in the products.
    """
    whole = jnp.sum(energy * original * original, axis=-2, keepdims=True)
    left = jnp.sum(energy * original * rounded, axis=-2, keepdims=True)
    gain = jnp.clip(whole / jnp.maximum(left, whole / MOST), 1.0 / MOST, MOST)
    return jnp.where(whole > 0, gain, 1.0)
