"""Normal noise for matrices that can be drawn again: known from a seed, the matrix and a number."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.models.config import ModelConfig
from lq.models.matrices import matrices


def noise_keys(config: ModelConfig, seed: int) -> dict[str, Array]:
    """A key for every block matrix, by path: its own whatever the units, and whichever matrices are drawn before."""
    key = jax.random.key(seed)
    return {path: jax.random.fold_in(key, i) for i, path in enumerate(matrices(config))}


@jax.jit
def with_noise(weight: Float[Array, "... K N"], key: Array, draw, size) -> Float[Array, "... K N"]:
    """weight + size z, z of independent standard normal numbers, those of the draw of this number; float32."""
    z = jax.random.normal(jax.random.fold_in(key, draw), weight.shape, jnp.float32)
    return weight.astype(jnp.float32) + size * z
