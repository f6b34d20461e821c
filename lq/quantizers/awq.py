"""AWQ, activation-aware weight quantization (Lin et al., arXiv 2306.00978): options, and the clipping of ranges.

AWQ rounds to nearest, twice prepared. First the input channels of a block are rescaled so that channels with large
activations are rounded finely (`lq.quantizers.awq_scaling`); it changes the block, not the codes, and goes before any
other quantizer too. Then, here, the range of every group of every output channel is clipped to where the group's share
of the output is least wrong on a sample X of the inputs:

    m* = argmin over m of  mean over rows x of X of  (x . Q(clip(w, -m, m)) - x . w)^2
    m  = max|w| (1 - i / grid),  i = 0, 1, ... below shrink * grid

with w and x the channels of one group. The first of equal candidates wins, so the range is left alone where the
inputs are all zero. Queries and keys are not clipped: their errors meet in the product q k, which this does not see.
Of a lookup, whose inputs are the channels one by one, the mean is that of the squared errors of the weights.

Ranges are the minimum and maximum of the clipped group (`asym`), zero inside or not; symmetric codes are `symr`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.statistics import HIGHEST, SAMPLE_ROWS, InputStats
from lq.errors import UserError
from lq.numerics.spec import QuantSpec
from lq.quantizers.rtn import SYMMETRIC, RTNOptions, group_ranges, round_to_codes, rtn, split_groups
from lq.registry import refuse_idle

NOT_CLIPPED = ("attention/q_proj", "attention/k_proj")
WHOLE = ("asym0", "asym")  # conventions of asymmetric codes that ranges are searched in
CHUNK = 256  # output channels whose partial products are there at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """How the scales of a block are searched. Raises UserError for a search without candidates."""

    convention: Literal["asym0", "asym", "symu", "symr", "symf"] | None = None  # None: asym, or symr when symmetric
    scale_grid: int = 20  # exponents 0, 1/20, ... 19/20
    duo: bool = False  # scales from the weights too

    def __post_init__(self):
        if self.scale_grid < 1:
            raise UserError(f"awq: option scale_grid: {self.scale_grid}; write 1 or more")

    def rounding(self, spec: QuantSpec) -> RTNOptions:
        """How a weight of `spec` is rounded. Raises UserError when the convention contradicts the spec."""
        kind, fitting = ("symmetric", SYMMETRIC) if spec.symmetric else ("asymmetric", WHOLE)
        convention = self.convention or ("symr" if spec.symmetric else "asym")
        if convention not in fitting:
            raise UserError(f"awq: convention {convention!r} does not fit {kind} codes; write {' or '.join(fitting)}")
        return RTNOptions(convention=convention, clip="none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQOptions(ScalingOptions):
    """How scales and ranges are searched. Raises UserError for a search without candidates."""

    scale: bool = True  # rescale the input channels of each block first
    clip: bool = True  # search ranges
    clip_grid: int = 20  # steps between the whole range and none
    clip_shrink: float = 0.5  # share of these steps that is tried
    propagate: bool = False  # a block's inputs come from the quantized blocks before it, not from the original ones

    def __post_init__(self):
        super().__post_init__()
        if self.clip_grid < 1:
            raise UserError(f"awq: option clip_grid: {self.clip_grid}; write 1 or more")
        if not 0 < self.clip_shrink <= 1:
            raise UserError(f"awq: option clip_shrink: {self.clip_shrink}; write a number above 0, at most 1")
        if not self.scale:
            refuse_idle(self, "awq", ("scale_grid", "duo"), "with scale: false no scales are searched")
        if not self.clip:
            refuse_idle(self, "awq", ("clip_grid", "clip_shrink"), "with clip: false no ranges are searched")

    def for_matrix(self, path: str) -> "AWQOptions":
        """The options of the matrix at `path`: queries and keys are not clipped."""
        if not path.endswith(NOT_CLIPPED):
            return self
        unused = {"clip_grid": AWQOptions.clip_grid, "clip_shrink": AWQOptions.clip_shrink}
        return dataclasses.replace(self, clip=False, **unused)


def awq(weight: Float[Array, "... K N"], stats: InputStats | None, spec: QuantSpec, options: AWQOptions):
    """Round to nearest within ranges clipped to where the outputs are least wrong, input channels rescaled before.

    Args:
      weight: in rescaled channels, as `lq.quantizers.awq_scaling` leaves it.
      stats: with a `sample` of the rescaled inputs, or the `square` of inputs that never meet, those of a lookup; None
        where `options.clip` is false.
      spec, options: static.

    Returns:
      Codes, scales and zeros as `rtn` does. Pure and jittable.

    Raises:
      UserError: a convention that contradicts the spec, or no sample to clip by.
    """
    rounding = options.rounding(spec)
    if not options.clip:
        return rtn(weight, None, spec, rounding)
    inputs = None if stats is None else stats.square if stats.sample is None else stats.sample
    if inputs is None:
        raise UserError("awq: ranges are clipped by the inputs; give calibration data, or write clip: false")

    def clip_and_round(weight, inputs):
        weight = weight.astype(jnp.float32)
        return rtn(_clip(weight, clip_search(weight, inputs, spec, options), spec), None, spec, rounding)

    for _ in weight.shape[:-2]:
        clip_and_round = jax.vmap(clip_and_round)
    return clip_and_round(weight, inputs)


def clip_search(
    weight: Float[Array, "K N"], inputs: Float[Array, "S K"] | Float[Array, " K"], spec: QuantSpec, options: AWQOptions
) -> Float[Array, "groups N"]:
    """The largest magnitude m* to keep of every group of every output channel; see the module's docstring.

    `inputs` are a sample, or one number for each channel: the mean squares of inputs that never meet. Of a sample of
    more than 512 rows an evenly spaced part is used. Computed in float32, `CHUNK` output channels at a time: the
    partial products of all would be `512 * groups * N` numbers.
    """
    (K, N), groups = weight.shape, spec.num_groups(weight.shape[0])
    if inputs.ndim == 1:
        x, _ = split_groups(inputs[:, None], spec)  # [groups, g, 1]
    else:
        x = inputs[:: -(-inputs.shape[0] // SAMPLE_ROWS)].astype(jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, groups * spec.group_length(K) - K)))
        x = x.reshape(x.shape[0], groups, -1).swapaxes(0, 1)  # [groups, S, g]
    width = min(CHUNK, N)
    chunks = -(-N // width)
    columns = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, chunks * width - N)))
    columns = columns.reshape(K, chunks, width).swapaxes(0, 1)
    lost = functools.partial(_weighed if inputs.ndim == 1 else _of_products, x)
    found = jax.lax.map(lambda columns: _search_columns(columns, lost, spec, options), columns)
    return found.swapaxes(0, 1).reshape(groups, -1)[:, :N]


def _of_products(x: Float[Array, "groups S g"], change: Float[Array, "groups g n"]) -> Float[Array, "groups 1 n"]:
    return jnp.square(jnp.matmul(x, change, precision=HIGHEST)).sum(axis=1, keepdims=True)


def _weighed(square: Float[Array, "groups g 1"], change: Float[Array, "groups g n"]) -> Float[Array, "groups 1 n"]:
    return (square * jnp.square(change)).sum(axis=1, keepdims=True)


def _search_columns(weight: Float[Array, "K n"], lost: Callable, spec: QuantSpec, options: AWQOptions):
    convention = options.rounding(spec).resolve(spec)
    grouped, real = split_groups(weight, spec)
    largest = jnp.abs(grouped).max(axis=1, keepdims=True)  # the padding is zero

    def attempt(i):
        clip = largest * (1.0 - i / options.clip_grid)
        clipped = jnp.clip(grouped, -clip, clip)
        scale, zero = group_ranges(clipped, real, 1.0, spec, convention)
        change = (round_to_codes(clipped, scale, zero, spec) - zero) * scale - grouped
        return lost(change), clip

    def step(i, best):
        least, best_clip = best
        error, clip = attempt(i)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, clip, best_clip)

    candidates = max(1, int(options.clip_shrink * options.clip_grid))
    return jax.lax.fori_loop(1, candidates, step, attempt(0))[1][:, 0]


def _clip(weight: Float[Array, "K N"], clip: Float[Array, "groups N"], spec: QuantSpec) -> Float[Array, "K N"]:
    rows = jnp.repeat(clip, spec.group_length(weight.shape[0]), axis=0)[: weight.shape[0]]
    return jnp.clip(weight, -rows, rows)
