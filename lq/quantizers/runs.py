"""A matrix whose input channels fall into runs of several widths, quantized: which channels and widths is given.

Permutation and widths are arguments of the compiled functions, so that matrices of one shape share a program whatever
their widths are.

Where a plan gives widths (`QuantSpec.widths`), its runs hold the channels of most energy first, and so do the groups
within them. That is the order in which GPTQ rounds them: it finds the range of every group when it comes to it, on what
the channels before have left, so that nothing that was made up for leaves its range. With ranges of the original
weights what one width costs depends on the widths before, and a mixture can be worse than each of its widths.

BAQ chooses widths and permutation by what channels lose (`sweep_runs`), which is no order of the sweep: its ranges are
found before.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.calibration.statistics import InputStats
from lq.numerics.segmented import runs_of
from lq.numerics.spec import QuantSpec
from lq.quantizers.gain import unit_gain
from lq.quantizers.gptq import GPTQFactor, GPTQOptions, dynamic_grid, energy, factorize, live, of_groups, with_gain
from lq.quantizers.rtn import RTNOptions, find_ranges, stored_scale, stored_zeros
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
      UserError: the options contradict the spec.
    """
    options.check(spec)
    factor = stats if isinstance(stats, GPTQFactor) else factorize(stats, options)
    permutation, codes, scales, zeros, _ = sweep_widths(weight, factor, spec, options)
    return permutation, cut(codes, scales, zeros, given_widths(spec), spec)


def given_widths(spec: QuantSpec) -> tuple[int, ...]:
    """Of the runs of a spec with groups by energy; one where it gives none."""
    return spec.widths or (spec.bits,)


def sweep_widths(weight: Float[Array, "K N"], factor: GPTQFactor, spec: QuantSpec, options: GPTQOptions):
    """The permutation, and what `sweep_runs` gives, of a spec with widths."""
    of_energy, length = energy(factor), spec.group_length(len(weight))
    # Where the sweep goes by energy its order is the one to keep, the sums of squares being rounded.
    order = factor.order if options.act_order else jnp.argsort(-of_energy, stable=True)
    permutation, widths = in_groups(order, length), jnp.asarray(given_widths(spec), jnp.int32)
    swept = sweep_in_order if options.dynamic(spec) else sweep_runs
    return permutation, *swept(weight, factor, permutation, widths, spec.segment(8), options)


def rtn_widths(weight: Float[Array, "K N"], stats: InputStats | None, spec: QuantSpec, options: RTNOptions):
    """Rounding to nearest of a matrix whose spec gives widths; as `gptq_widths`, from statistics with a `square`.

    Raises ValueError without statistics, which the option `importance` has collected: they show which channels have
    most energy.
    """
    if stats is None:
        raise ValueError("groups by energy need statistics of the inputs")
    permutation, codes, scales, zeros, _ = round_widths(weight, stats.square, spec, options)
    return permutation, cut(codes, scales, zeros, given_widths(spec), spec)


def round_widths(weight: Float[Array, "K N"], square: Float[Array, " K"] | None, spec: QuantSpec, options: RTNOptions):
    """The permutation, and what `round_runs` gives, of a spec with widths; `square` is what `energy` is to GPTQ.

    Raises ValueError without it.
    """
    if square is None:
        raise ValueError("groups by energy need statistics of the inputs, with a square")
    permutation = in_groups(jnp.argsort(-square, stable=True), spec.group_length(len(weight)))
    widths = jnp.asarray(given_widths(spec), jnp.int32)
    return permutation, *round_runs(weight, square, permutation, widths, spec.segment(8), options)


@functools.partial(jax.jit, static_argnames="length")
def in_groups(order: Int[Array, " K"], length: int) -> Int[Array, " K"]:
    """The channels in that order, but in their own within each group of `length`: the group of each says it all."""
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
    real = jnp.ones(importance.shape, bool)
    grid = _grid_of_runs(grouped, real, importance, widths, spec, options, low, high)

    position = jnp.zeros(K, jnp.int32).at[permutation].set(jnp.arange(K, dtype=jnp.int32))
    block = options.block_channels(K)
    grid_of = fixed_grid(grid, position[factor.order] // length, block)
    difference, _ = sweep(weight, factor.upper, factor.order, grid_of, block)
    difference, scale = with_gain(weight, difference, grid.scale, position // length, factor, spec, options)
    return *_coded(weight, difference, permutation, grid._replace(scale=scale), spec), difference


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def sweep_in_order(
    weight: Float[Array, "K N"],
    factor: GPTQFactor,
    permutation: Int[Array, " K"],
    widths: Int[Array, " R"],
    spec: QuantSpec,
    options: GPTQOptions,
) -> tuple[Float[Array, "K N"], Float[Array, "groups N"], Array | None, Float[Array, "K N"]]:
    """As `sweep_runs`, of groups that are those of the sweep: ranges are found as it comes to them."""
    K, length, groups = len(weight), spec.group_length(len(weight)), spec.num_groups(len(weight))
    weight = live(weight, factor)
    block = options.block_channels(K, length)
    of_group = jnp.repeat(widths, groups // len(widths))
    of_group = jnp.pad(of_group, (0, -groups % (block // length)), mode="edge")

    def grid_of_groups(first, grouped, real, importance):
        widths = jax.lax.dynamic_slice_in_dim(of_group, first, len(grouped))
        return _grid_of_runs(grouped, real, importance, widths, spec, options, 1, 8)

    grid_of = dynamic_grid(grid_of_groups, energy(factor)[factor.order], length, block)
    difference, found = sweep(weight, factor.upper, factor.order, grid_of, block)
    grid, position = of_groups(found, groups), jnp.argsort(permutation)
    difference, scale = with_gain(weight, difference, grid.scale, position // length, factor, spec, options)
    return *_coded(weight, difference, permutation, grid._replace(scale=scale), spec), difference


def _coded(weight: Array, difference: Array, permutation: Array, grid: Grid, spec: QuantSpec):
    """Codes, scales and zeros of W - D, in the order of the permutation."""
    groups = len(grid.scale)
    stands_for = (weight - difference)[permutation].reshape(groups, -1, weight.shape[-1])
    codes = jax.tree.map(lambda a: a[:, None], grid).code(stands_for)
    return codes.reshape(weight.shape).astype(jnp.uint32), grid.scale, stored_zeros(grid.zero, spec)


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
    grid = _grid_of_runs(grouped, jnp.ones(of_group.shape, bool), of_group, widths, spec, options, 1, 8)
    by_group = jax.tree.map(lambda a: a[:, None], grid)
    codes, rounded, scales = by_group.code(grouped).astype(jnp.uint32), by_group.nearest(grouped), grid.scale
    if options.unit_gain:
        scales = stored_scale(scales * unit_gain(grouped, rounded, of_group)[:, 0], spec)
        rounded = rounded * (scales / grid.scale)[:, None]
    difference = weight - jnp.zeros_like(weight).at[permutation].set(rounded.reshape(K, N))
    return codes.reshape(K, N), scales, stored_zeros(grid.zero, spec), difference


def _grid_of_runs(
    grouped, real, importance, widths: Int[Array, " R"], spec: QuantSpec, options, low: int, high: int
) -> Grid:
    """The ranges of all groups, run by run, each found for the width of its run, which is not known to the compiler."""
    groups, _, N = grouped.shape
    per_run = groups // len(widths)

    def at(bits: int):
        return lambda run: find_ranges(run[0], run[1], spec.segment(bits), options, run[2])

    choices = [at(bits) for bits in range(low, high + 1)]
    runs = [a.reshape(-1, per_run, *a.shape[1:]) for a in (grouped, real, importance)]
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
