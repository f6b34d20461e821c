"""The sweep of GPTQ: one input channel after the other is rounded, and the rest make up for its error. Arrays only.

Minimized is tr(D^T H D) over D = W - Q, where W `[K, N]` are the weights, Q what their codes stand for and H `[K, K]`
the second moment of the inputs. With H = R R^T, R upper triangular, it is the sum of the squares of R^T D, whose row k
knows the channels up to k only. So channel k, once those before it are fixed, is best rounded from its target

    t_k = w_k + sum over j < k of (R_jk / R_kk) d_j,      d_j = w_j - q_j,

and contributes R_kk^2 (t_k - q_k)^2. These are the t_k of GPTQ (Frantar et al., arXiv 2210.17323), which gets them from
U = R^-1; the form here is that of LDLQ (Chee et al., arXiv 2307.13304, theorem 6) and inverts nothing.

The sums are taken in three parts, so that most of the work is products of matrices: over the blocks before (a chunk of
them at a time), over the tiles before in the block, and over the channels before in the tile. Output channels do not
meet: the columns may be shared out over devices, with R on all of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.calibration.statistics import HIGHEST
from lq.quantizers.rtn import nearest_code

TILE = 8  # channels in one unrolled piece of program, which compiles to one kernel
CHUNK = 8  # blocks of finished channels that one product sums over


class Grid(NamedTuple):
    """What the codes of C channels stand for: scale * (code - zero), with codes 0 to `top`."""

    scale: Float[Array, "C N"]
    zero: Float[Array, "C N"]
    top: Float[Array, "C 1"]

    def code(self, x: Array) -> Array:
        """clip(round(x / s + z), 0, top), a float."""
        return jnp.clip(nearest_code(x / self.scale, self.zero, self.top), 0.0, self.top)

    def nearest(self, x: Array) -> Array:
        """What the code of x stands for."""
        return self.scale * (self.code(x) - self.zero)

    def rows(self, start, length: int) -> "Grid":
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, length), self)


GridOf = Callable[[Array, Callable[[], Array]], tuple[Grid, Any]]


def sweep(
    weight: Float[Array, "K N"],
    upper: Float[Array, "K K"],
    order: Int[Array, " K"],
    grid_of: GridOf,
    block: int,
) -> tuple[Float[Array, "K N"], Any]:
    """Rounds the channels of `weight` one after the other.

    Args:
      weight: float32.
      upper: R, float32, of the channels in the order of the sweep.
      order: the channel that is rounded first, and so on: a permutation.
      grid_of: (number of the block, function) -> (`Grid` of its channels, anything to keep). The function gives the
        weights `[block, N]` of the block as GPTQ's updates leave them when the sweep comes to the block.
      block: channels between two products with all finished ones.

    Returns:
      D in the order of `weight`, and what `grid_of` gave to keep, stacked over the blocks.
    """
    K, N = weight.shape
    blocks = -(-K // block)
    padding = blocks * block - K
    # Channels that pad the last block come after all others and touch none.
    padded_order = jnp.pad(order, (0, padding))
    pivots = jnp.pad(jnp.diagonal(upper), (0, padding), constant_values=1.0)
    upper = jnp.pad(upper, ((0, padding), (0, padding)))

    def step(difference, i):
        of_block = lambda a, axis=0: jax.lax.dynamic_slice_in_dim(a, i * block, block, axis)  # noqa: E731
        original = jnp.take(weight, of_block(padded_order), axis=0)
        coupling = of_block(upper, axis=1) / of_block(pivots)
        targets = original + _sum_of_finished(coupling, difference, i)
        grid, kept = grid_of(i, lambda: _compensated(original, targets, of_block(coupling)))
        d = _sweep_block(original, targets, of_block(coupling), grid)
        return jax.lax.dynamic_update_slice_in_dim(difference, d, i * block, axis=0), kept

    nothing = jnp.zeros((blocks * block, N), jnp.float32)
    difference, kept = jax.lax.scan(step, nothing, jnp.arange(blocks))
    return difference[jnp.argsort(order)], kept


def fixed_grid(grid: Grid, row_of: Int[Array, " K"], block: int) -> GridOf:
    """For `sweep`: the k-th channel that is rounded has row `row_of[k]` of `grid`, which is known beforehand."""
    row_of = jnp.pad(row_of, (0, -len(row_of) % block))

    def grid_of(i, compensated):
        rows = jax.lax.dynamic_slice_in_dim(row_of, i * block, block)
        return jax.tree.map(lambda a: jnp.take(a, rows, axis=0), grid), None

    return grid_of


def _sum_of_finished(coupling: Float[Array, "K block"], difference: Float[Array, "K N"], i) -> Array:
    """coupling^T @ difference over the channels before block `i`; `difference` is still zero from there on."""
    K, block = coupling.shape
    chunk = block * max(d for d in range(1, CHUNK + 1) if K // block % d == 0)

    def add(c, total):
        rows = lambda a: jax.lax.dynamic_slice_in_dim(a, c * chunk, chunk)  # noqa: E731
        return total + jnp.matmul(rows(coupling).T, rows(difference), precision=HIGHEST)

    nothing = jnp.zeros((block, difference.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, (i * block + chunk - 1) // chunk, add, nothing)


def _compensated(original: Array, targets: Array, coupling: Float[Array, "block block"]) -> Array:
    """GPTQ's updated weights w', which minimize the error while none of their block is rounded.

    Each is then its own target: t - w = M^T (w' - w), with M the coupling and ones on the diagonal. M is inverted,
    where one could solve, because a solver would gather columns that are shared out over devices.
    """
    identity = jnp.eye(len(coupling), dtype=coupling.dtype)
    inverse = jax.scipy.linalg.solve_triangular(coupling, identity, unit_diagonal=True)
    return original + jnp.matmul(inverse.T, targets - original, precision=HIGHEST)


def _sweep_block(original: Array, targets: Array, coupling: Float[Array, "block block"], grid: Grid) -> Array:
    """D of one block, tile by tile. The channels before the block are in `targets` already."""
    tile = math.gcd(len(original), TILE)

    def step(t, d):
        rows = lambda a: jax.lax.dynamic_slice_in_dim(a, t * tile, tile)  # noqa: E731
        columns = jax.lax.dynamic_slice_in_dim(coupling, t * tile, tile, axis=1)
        target = rows(targets) + jnp.matmul(columns.T, d, precision=HIGHEST)
        new = _sweep_tile(rows(original), target, rows(columns), grid.rows(t * tile, tile))
        return jax.lax.dynamic_update_slice_in_dim(d, new, t * tile, axis=0)

    return jax.lax.fori_loop(0, len(original) // tile, step, jnp.zeros(original.shape, jnp.float32))


def _sweep_tile(original: Array, targets: Array, coupling: Float[Array, "tile tile"], grid: Grid) -> Array:
    """D of one tile, unrolled: elementwise in the output channels throughout."""
    d = []
    for k in range(len(original)):
        target = targets[k]
        for j in range(k):
            target = target + coupling[j, k] * d[j]
        of_channel = jax.tree.map(lambda a, k=k: a[k], grid)
        d.append(original[k] - of_channel.nearest(target))
    return jnp.stack(d)
