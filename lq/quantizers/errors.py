"""What a quantized matrix does to the output of its layer, from the second moment of the inputs alone."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.statistics import HIGHEST, InputStats


@functools.partial(jax.jit, static_argnames="channels")
def output_error(
    weight: Float[Array, "... K N"],
    dequantized: Float[Array, "... K N"],
    stats: InputStats,
    channels: int | None = None,
) -> Float[Array, "..."]:
    """||X (W - Q)||^2 / ||X W||^2 over the calibration tokens X: tr(D^T H D) / tr(W^T H W), D = W - Q.

    Args:
      weight, dequantized: W and Q, any float dtype.
      stats: with a `hessian`; leading axes as those of the weight.
      channels: look at no more output channels than so many, evenly spaced; all when None. Each takes K^2 products
        twice, in a large matrix more than it took to find its codes.

    Returns:
      float32, one number for each matrix of a stack; 0 where nothing is lost, of an output that is 0 too.
    """
    if stats.hessian is None:
        raise ValueError("the output error needs statistics with a hessian")
    every = 1 if channels is None else -(-weight.shape[-1] // channels)
    weight, dequantized = (a[..., ::every].astype(jnp.float32) for a in (weight, dequantized))
    lost, whole = (output_energy(w, stats.hessian) for w in (weight - dequantized, weight))
    return jnp.where(lost == 0, 0.0, lost / whole)


def output_energy(weight: Float[Array, "... K N"], hessian: Float[Array, "... K K"] | None) -> Float[Array, "..."]:
    """||X W||^2 = tr(W^T H W) with H = X^T X; ||W||^2 where H is None: of inputs that all count alike."""
    weighed = weight if hessian is None else jnp.matmul(hessian, weight, precision=HIGHEST)
    return jnp.sum(weight * weighed, axis=(-2, -1))
