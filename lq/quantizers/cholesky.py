"""The Cholesky factor of a large matrix, by a program whose size does not depend on the matrix.

CPU and GPU call a library. For a TPU, XLA writes the factorization out block by block: of 4096 channels that takes a
minute to compile, and far more than its share of more. `blocked_cholesky` is a loop.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.statistics import HIGHEST

BLOCK = 128  # columns of the factor found at once


def cholesky(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """L, lower triangular with L L^T = `matrix`, float32; some of it NaN where the matrix is not positive definite.

    Only the lower triangle is read. The gradient is not defined.
    """
    library = lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False)  # noqa: E731
    return jax.lax.platform_dependent(matrix, tpu=blocked_cholesky, default=library)


def blocked_cholesky(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """As `cholesky`, from left to right: each block of columns less what those before it make up of it.

    Of the products with all columns those of columns not yet found are with zeros: K^3 multiplications, where K^3 / 3
    would do.
    """
    K = len(matrix)
    blocks = -(-K // BLOCK)
    size = blocks * BLOCK
    padded = jnp.eye(size).at[:K, :K].set(matrix)
    row, column = jnp.arange(size)[:, None], jnp.arange(BLOCK)

    def step(j, lower):
        start = j * BLOCK
        of_block = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, start, BLOCK, axis)  # noqa: E731
        rest = of_block(padded, 1) - jnp.matmul(lower, of_block(lower, 0).T, precision=HIGHEST)
        corner = jax.lax.linalg.cholesky(of_block(rest, 0), symmetrize_input=False)
        found = jax.lax.linalg.triangular_solve(corner, rest, left_side=False, lower=True, transpose_a=True)
        return jax.lax.dynamic_update_slice_in_dim(lower, jnp.where(row >= start + column, found, 0.0), start, axis=1)

    return jax.lax.fori_loop(0, blocks, step, jnp.zeros((size, size), jnp.float32))[:K, :K]
