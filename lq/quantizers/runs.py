"""A matrix whose input channels fall into runs of several widths, quantized: which channels and widths is given.

Permutation and widths are arguments of the compiled functions, so that matrices of one shape share a program whatever
their widths are. Ranges are found on the original weights, run by run; GPTQ then rounds the channels in its own order,
each on the grid of its run, or every weight is rounded to nearest.

Where a plan gives widths (`QuantSpec.widths`), its runs hold the channels of most energy first; BAQ chooses both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.numerics.segmented import run_channels, runs_of
from lq.numerics.spec import QuantSpec
from lq.quantizers.gptq import GPTQFactor, GPTQOptions, energy, factorize, live
from lq.quantizers.rtn import RTNOptions, find_ranges, stored_zeros
from lq.quantizers.sweep import Grid, fixed_grid, sweep

Segments = list[tuple[int, Array, Array, Array | None]]  # width, codes, scales, zeros


def gptq_widths(weight: Float[Array, "K N"], stats: InputStats | GPTQFactor, spec: QuantSpec, options: GPTQOptions):
    """GPTQ on a matrix whose spec gives widths.

    Args:
      weight: any float dtype, finite.
      stats: statistics with a `hessian`, or what `factorize` made of them.
      spec: with `widths`.

    Returns:
      What `SegmentedQTensor.from_segments` takes: the permutation int32 `[K]`, and the segments: width, codes uint32
      `[channels, N]`, scales float32 and zeros uint32 `[groups, N]` (None when symmetric).

    Raises:
      UserError: ranges that depend on the sweep, which with several widths are found before it.
    """
    options.resolve(spec)
    if not options.static_groups:
        raise UserError(f"{options.method}: the ranges of widths by segment are found before the sweep; write "
                        "static_groups true")  # fmt: skip
    factor = stats if isinstance(stats, GPTQFactor) else factorize(stats, options)
    permutation, widths = by_energy(energy(factor), run_channels(spec, len(weight))), np.asarray(spec.widths, np.int32)
    codes, scales, zeros, _ = sweep_runs(weight, factor, permutation, widths, spec.segment(8), options)
    return permutation, cut(codes, scales, zeros, spec.widths or (), spec)


def rtn_widths(weight: Float[Array, "K N"], stats: InputStats | None, spec: QuantSpec, options: RTNOptions):
    """Rounding to nearest of a matrix whose spec gives widths; as `gptq_widths`, from statistics with a `square`.

    Raises UserError without statistics, which `clip="opt"` has collected: they show which channels have most energy.
    """
    if stats is None or stats.square is None:
        raise UserError(
            "rtn: widths by segment go by the energy of the inputs, which is not looked at; write the option clip: opt"
        )
    permutation, widths = by_energy(stats.square, run_channels(spec, len(weight))), np.asarray(spec.widths, np.int32)
    codes, scales, zeros, _ = round_runs(weight, stats.square, permutation, widths, spec.segment(8), options)
    return permutation, cut(codes, scales, zeros, spec.widths or (), spec)


@functools.partial(jax.jit, static_argnames="length")
def by_energy(energies: Float[Array, " K"], length: int) -> Int[Array, " K"]:
    """The channels in runs of `length`, most energy first, the first of equals; within a run in their own order."""
    order = jnp.argsort(-energies, stable=True)
    return jnp.sort(order.reshape(-1, length), axis=1).reshape(-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("spec", "options", "low", "high"))
def sweep_runs(
    weight: Float[Array, "K N"],
    factor: GPTQFactor,
    permutation: Int[Array, " K"],
    widths: Int[Array, " R"],
    spec: QuantSpec,
    options: GPTQOptions,
    low: int = 1,
    high: int = 8,
) -> tuple[Float[Array, "K N"], Float[Array, "groups N"], Array | None, Float[Array, "K N"]]:
    """GPTQ's sweep with runs of equal length, each at its width from `low` to `high`.

    Returns codes, uint32, and scales and zeros, all in the order of the permutation; and the difference D = W - Q in
    the order of `weight`.
    """
    K, N = weight.shape
    length, groups = spec.group_length(K), spec.num_groups(K)
    weight = live(weight, factor)
    grouped = weight[permutation].reshape(groups, length, N)
    importance = energy(factor)[permutation].reshape(groups, length, 1)
    grid = _grid_of_runs(grouped, importance, widths, spec, options, low, high)

    position = jnp.zeros(K, jnp.int32).at[permutation].set(jnp.arange(K, dtype=jnp.int32))
    block = min(options.block, K)
    grid_of = fixed_grid(grid, position[factor.order] // length, block)
    difference, _ = sweep(weight, factor.upper, factor.order, grid_of, block)
    stands_for = grouped - difference[permutation].reshape(groups, length, N)
    codes = jax.tree.map(lambda a: a[:, None], grid).code(stands_for)
    return codes.reshape(K, N).astype(jnp.uint32), grid.scale, stored_zeros(grid.zero, spec), difference


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def round_runs(
    weight: Float[Array, "K N"],
    importance: Float[Array, " K"],
    permutation: Int[Array, " K"],
    widths: Int[Array, " R"],
    spec: QuantSpec,
    options: RTNOptions,
) -> tuple[Float[Array, "K N"], Float[Array, "groups N"], Array | None, Float[Array, "K N"]]:
    """What `sweep_runs` gives, of weights rounded to nearest. `importance` is the h_k of `clip="opt"`."""
    K, N = weight.shape
    length, groups = spec.group_length(K), spec.num_groups(K)
    weight = weight.astype(jnp.float32)
    grouped = weight[permutation].reshape(groups, length, N)
    of_group = importance[permutation].reshape(groups, length, 1)
    grid = _grid_of_runs(grouped, of_group, widths, spec, options, 1, 8)
    by_group = jax.tree.map(lambda a: a[:, None], grid)
    codes = by_group.code(grouped).reshape(K, N).astype(jnp.uint32)
    rounded = jnp.zeros_like(weight).at[permutation].set(by_group.nearest(grouped).reshape(K, N))
    return codes, grid.scale, stored_zeros(grid.zero, spec), weight - rounded


def _grid_of_runs(grouped, importance, widths: Int[Array, " R"], spec: QuantSpec, options, low: int, high: int) -> Grid:
    """The ranges of all groups, run by run, each found for the width of its run, which is not known to the compiler."""
    groups, length, N = grouped.shape
    per_run = groups // len(widths)
    real = jnp.ones((per_run, length, 1), bool)

    def at(bits: int):
        return lambda run: find_ranges(run[0], real, spec.segment(bits), options, run[1])

    choices = [at(bits) for bits in range(low, high + 1)]
    runs = grouped.reshape(-1, per_run, length, N), importance.reshape(-1, per_run, length, 1)
    pick = lambda pair: jax.lax.switch(pair[0] - low, choices, pair[1])  # noqa: E731
    scale, zero = jax.lax.map(pick, (widths, runs))
    top = jnp.repeat(jnp.exp2(widths.astype(jnp.float32)) - 1.0, per_run)
    return Grid(scale.reshape(groups, N), zero.reshape(groups, N), top[:, None])


def cut(codes: Array, scales: Array, zeros: Array | None, widths, spec: QuantSpec) -> Segments:
    """Cut where the width changes."""
    found, group = [], spec.group_length(len(codes))
    for bits, first, stop in runs_of([int(width) for width in widths], len(codes) // len(widths)):
        groups = slice(first // group, stop // group)
        found.append((bits, codes[first:stop], scales[groups], None if zeros is None else zeros[groups]))
    return found
