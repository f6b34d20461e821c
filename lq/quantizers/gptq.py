"""GPTQ: input channels are rounded one by one, and those not yet rounded make up for the error (arXiv 2210.17323).

The inputs x of a matrix enter through their second moment H, the sum of x x^T. It is damped and factored once for every
matrix that reads the same inputs (`factorize`); `lq.quantizers.sweep` has the sweep itself and its derivation.

With `act_order` the channels of most energy H_kk are rounded first, while all others can still make up for them. A
group that is a run of neighbouring channels is then met in pieces, so that its range is found on the original weights
(`static_groups`).

Where the sweep meets a group whole, in natural order, or in act-order where a plan gives widths and the groups are
those of the sweep (`lq.quantizers.runs`), the ranges of all groups that begin in one block of the sweep are found when
it comes to that block, on the weights as the channels before have left them. That is when Frantar's code finds them
too: of groups shorter than the block, those after the first do not see what happens within it. Its block is 128; here
it is one group unless `block` says otherwise, and each range is found as late as can be.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lq.calibration.statistics import HIGHEST, InputStats
from lq.errors import UserError
from lq.numerics.spec import QuantSpec
from lq.quantizers.cholesky import cholesky
from lq.quantizers.gain import unit_gain
from lq.quantizers.rtn import RangeOptions, find_ranges, round_to_codes, split_groups, stored_scale, stored_zeros
from lq.quantizers.sweep import Grid, GridOf, fixed_grid, sweep

BLOCK = 128  # channels
DAMPING_TRIES = 10  # each ten times the one before
LEAST_RETRY = 1e-4  # of the mean diagonal: where no damping was asked for, what is tried next


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQOptions(RangeOptions):
    """How GPTQ damps, orders and groups. Ranges as in `RangeOptions`, where "opt" weighs the errors by H_kk."""

    method: ClassVar[str] = "gptq"

    damping: float = 0.01  # added to the diagonal of H, as a share of its mean
    act_order: bool = True  # channels of large H_kk first
    # Ranges of the original weights, not of the compensated ones. None: only where the sweep meets groups in pieces.
    static_groups: bool | None = None
    # Channels between two products with all finished ones. None: 128, and one group where ranges are found in the
    # sweep, each then as late as can be.
    block: int | None = None
    # For the driver. The inputs of a matrix are what the quantized matrices before it in its block give, and those of a
    # block what the quantized blocks before it give; false: what the original ones give.
    true_sequential: bool = True
    propagate: bool = True

    def __post_init__(self):
        if not 0.0 <= self.damping < float("inf"):
            self._refuse("damping", self.damping, "a share of the mean diagonal, such as 0.01")
        if self.block is not None and self.block < 1:
            self._refuse("block", self.block, "a number of channels, such as 128, or null")

    def _refuse(self, option: str, value, instead: str):
        raise UserError(f"{self.method}: option {option}: {value}; write {instead}")

    def check(self, spec: QuantSpec) -> None:
        """Raises UserError when an option contradicts the spec or another option."""
        if self.static_groups is False and not self._meets_groups_whole(spec):
            if not spec.ordered:
                problem, instead = "act_order without static_groups", "act_order false, or group_size null"
            else:
                problem, instead = "groups by energy, without act_order,", "act_order true"
            raise UserError(
                f"{self.method}: {problem} scatters the channels of a group; write static_groups true, {instead}"
            )
        self.resolve(spec)

    def dynamic(self, spec: QuantSpec) -> bool:
        """Whether the range of a group is found when the sweep comes to it."""
        return self._meets_groups_whole(spec) and not self.static_groups

    def block_channels(self, in_features: int, group: int | None = None) -> int:
        """The block of a sweep over `in_features` channels: whole groups of `group`, where ranges are found in it."""
        if group is None:
            return min(self.block or BLOCK, in_features)
        return group * -(-min(self.block or 1, in_features) // group)

    def _meets_groups_whole(self, spec: QuantSpec) -> bool:
        """Whether the sweep finishes one group before the next begins."""
        return spec.group_size is None or self.act_order == spec.ordered


@flax.struct.dataclass
class GPTQFactor:
    """What of the inputs' second moment serves every matrix `[K, N]` that reads them. A leading axis for experts.

    R R^T = H + damping I, with the channels in the order of the sweep and R upper triangular.
    """

    upper: Float[Array, "... K K"]  # R
    order: Int[Array, "... K"]  # the channel that is rounded first, and so on
    dead: Bool[Array, "... K"]  # channels, in their own order, whose input was never anything but zero
    damping: Float[Array, "..."]  # what was added; infinite when no factor was found, and R is the identity then

    @property
    def finite(self) -> Bool[Array, "..."]:
        """Whether there is a factor. False: H is not finite; the sweep then rounds to nearest."""
        return jnp.isfinite(self.damping)


def factorize(stats: InputStats, options: GPTQOptions) -> GPTQFactor:
    """The Cholesky factor of the damped, ordered `stats.hessian` `[..., K, K]`, float32. Pure and jittable.

    Damping is `options.damping` times the mean of the diagonal; where the factor is not finite ten times that, and so
    on, up to `DAMPING_TRIES` times. See `GPTQFactor.finite` for when none was found.

    A channel with H_kk = 0 is dead: its weights have no effect, are rounded to zero and touch nothing else. Where every
    channel is (an expert that no token reached), none is treated so, and all are rounded to nearest.
    """
    return _factorize(_hessian(stats), options.damping, options.act_order)


def _hessian(stats: InputStats | None) -> Array:
    if stats is None or stats.hessian is None:
        raise ValueError("GPTQ needs statistics of the inputs, with a hessian")
    return stats.hessian.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("damping_share", "act_order"))
def _factorize(hessian: Array, damping_share: float, act_order: bool) -> GPTQFactor:
    if hessian.ndim > 2:
        return jax.lax.map(lambda of_expert: _factorize(of_expert, damping_share, act_order), hessian)
    K = len(hessian)
    energy = jnp.diagonal(hessian)
    alive = energy != 0
    mean = jnp.where(alive.any(), jnp.sum(energy) / jnp.maximum(alive.sum(), 1), 1.0)
    order = jnp.argsort(-energy) if act_order else jnp.arange(K)

    # The Cholesky factor of H with rows and columns reversed is lower triangular; reversed again it is R.
    backward = order[::-1]
    reordered = hessian[backward[:, None], backward]
    diagonal = jnp.where(alive, energy, mean)[backward]

    def attempt(state):
        tries, damping, _ = state
        damping = jnp.where(tries > 0, jnp.maximum(10.0 * damping, LEAST_RETRY * mean), damping)
        damped = jnp.where(jnp.eye(K, dtype=bool), diagonal + damping, reordered)
        return tries + 1, damping, cholesky(damped)

    def to_go_on(state):
        tries, _, lower = state
        return ~jnp.isfinite(lower).all() & (tries < DAMPING_TRIES)

    start = jnp.int32(0), damping_share * mean, jnp.full((K, K), jnp.nan, jnp.float32)
    _, damping, lower = jax.lax.while_loop(to_go_on, attempt, start)
    found = jnp.isfinite(lower).all()
    return GPTQFactor(
        upper=jnp.where(found, lower[::-1, ::-1], jnp.eye(K)),
        order=order.astype(jnp.int32),
        dead=~alive & alive.any(),
        damping=jnp.where(found, damping, jnp.inf),
    )


def gptq(weight: Float[Array, "... K N"], stats: InputStats | GPTQFactor, spec: QuantSpec, options: GPTQOptions):
    """GPTQ: channels not yet rounded make up for the errors of those that are, in the metric of the layer's inputs.

    Equal to `rtn` where H is diagonal. Pure and jittable; `spec` and `options` are static.

    Args:
      weight: any float dtype, finite. A leading axis is a stack of experts, swept one after the other.
      stats: statistics with a `hessian`, or what `factorize` made of them; with the leading axis of the weight.

    Returns:
      Codes uint32 `[..., K, N]`, scales float32 `[..., groups, N]`, already rounded to `spec.scale_dtype`, and zeros of
      the same shape: uint32, float32 rounded to `spec.zero_dtype` when that is set, None when symmetric.

    Raises:
      UserError: the options contradict the spec.
      ValueError: no statistics.

    Source: Frantar et al., arXiv 2210.17323, algorithm 1, with the options of the code beside it.
    """
    options.check(spec)
    factor = stats if isinstance(stats, GPTQFactor) else factorize(stats, options)
    if weight.ndim > 2:
        return jax.lax.map(lambda pair: gptq(pair[0], pair[1], spec, options), (weight, factor))
    difference, scale, zero = sweep_matrix(weight, factor, spec, options)
    # W - D is what the codes stand for, but for rounding: its nearest codes are they.
    grouped, _ = split_groups(live(weight, factor) - difference, spec)
    codes = round_to_codes(grouped, scale[:, None], zero[:, None], spec)
    codes = codes.reshape(-1, weight.shape[-1])[: len(weight)].astype(jnp.uint32)
    return codes, scale, stored_zeros(zero, spec)


def sweep_matrix(weight: Float[Array, "K N"], factor: GPTQFactor, spec: QuantSpec, options: GPTQOptions):
    """The sweep of `gptq`: D = W - Q `[K, N]`, of `live` weights, and scale and zero `[groups, N]`; all float32."""
    K, groups = len(weight), spec.num_groups(len(weight))
    weight = live(weight, factor)
    length = spec.group_length(K)
    if groups == 1 or not options.dynamic(spec):
        block = options.block_channels(K)
        importance, _ = split_groups(energy(factor)[:, None], spec)
        scale, zero = (a[:, 0] for a in find_ranges(*split_groups(weight, spec), spec, options, importance))
        rows = Grid(scale, zero, jnp.full((groups, 1), float(spec.max_code)))
        grid_of = fixed_grid(rows, factor.order // length, block)
        difference, _ = sweep(weight, factor.upper, factor.order, grid_of, block)
        return *with_gain(weight, difference, scale, jnp.arange(K) // length, factor, spec, options), zero
    block = options.block_channels(K, length)

    def grid_of_groups(_, grouped, real, importance):
        scale, zero = (a[:, 0] for a in find_ranges(grouped, real, spec, options, importance))
        return Grid(scale, zero, jnp.full((len(grouped), 1), float(spec.max_code)))

    grid_of = dynamic_grid(grid_of_groups, energy(factor), length, block)
    difference, found = sweep(weight, factor.upper, factor.order, grid_of, block)
    grid = of_groups(found, groups)
    return *with_gain(weight, difference, grid.scale, jnp.arange(K) // length, factor, spec, options), grid.zero


def with_gain(
    weight: Float[Array, "K N"],
    difference: Float[Array, "K N"],
    scale: Float[Array, "groups N"],
    group_of: Int[Array, " K"],
    factor: GPTQFactor,
    spec: QuantSpec,
    options: RangeOptions,
) -> tuple[Float[Array, "K N"], Float[Array, "groups N"]]:
    """D and the scales, with unit gain of the outputs where `options` say so: inner products are in H + damping I.

    `weight` is `live`; `group_of` is the group of every channel.
    """
    if not options.unit_gain:
        return difference, scale
    through = lambda a: jnp.matmul(factor.upper.T, a[factor.order], precision=HIGHEST)  # noqa: E731
    stored = stored_scale(scale * unit_gain(through(weight), through(weight - difference)), spec)
    return weight - (weight - difference) * (stored / scale)[group_of], stored


def live(weight: Float[Array, "K N"], factor: GPTQFactor) -> Float[Array, "K N"]:
    """float32, the weights of dead channels at zero."""
    return jnp.where(factor.dead[:, None], 0.0, weight.astype(jnp.float32))


def energy(factor: GPTQFactor) -> Float[Array, " K"]:
    """H_kk + damping of every channel, float32."""
    return jnp.zeros(len(factor.order)).at[factor.order].set(jnp.sum(factor.upper**2, axis=1))


def dynamic_grid(
    grid_of_groups: Callable[[Array, Array, Array, Array], Grid],
    importance: Float[Array, " K"],
    length: int,
    block: int,
) -> GridOf:
    """For `sweep`: the ranges of groups that it meets whole, found on the compensated weights and kept.

    Args:
      grid_of_groups: (number of the first group, weights `[groups, length, N]`, which of them are real, importance
        `[groups, length, 1]`) of the groups of a block -> their `Grid`, a row for each.
      importance: of the channels in the order of the sweep.
      length: of a group.
      block: of the sweep; whole groups.
    """
    real = jnp.arange(-(-len(importance) // block) * block) < len(importance)
    importance = jnp.pad(importance, (0, len(real) - len(importance)))

    def grid_of(i, compensated):
        of_block = lambda a: jax.lax.dynamic_slice_in_dim(a, i * block, block).reshape(-1, length, 1)  # noqa: E731
        # Of a group of padding alone any range will do, if it is finite.
        mask = of_block(real) | ~of_block(real).any(axis=1, keepdims=True)
        grouped = compensated().reshape(block // length, length, -1)
        found = grid_of_groups(i * (block // length), grouped, mask, of_block(importance))
        return jax.tree.map(lambda a: jnp.repeat(a, length, axis=0), found), found

    return grid_of


def of_groups(found: Grid, groups: int) -> Grid:
    """What `dynamic_grid` kept, block by block, as one row for each of the groups."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[:groups], found)
