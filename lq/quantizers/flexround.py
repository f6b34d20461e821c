"""FlexRound (Lee et al., arXiv 2306.00317; code onliwad101/FlexRound_LRQ): rounding learned as a division.

The weight is divided by a learned positive matrix before it is rounded, and scaled back by the learned scale alone:

    W^ = s1 (clip(round(W / (s1 S2 s3)) + z, 0, 2^b - 1) - z),   s1 = s exp(delta1), S2 = exp(delta2), s3 = exp(delta3)

with s1 per group, S2 per weight, s3 per output channel, z and s those of round to nearest. All deltas start at 0, which
is round to nearest. The gradient of W^ in S2 is -W / (S2^2 s3): large weights travel furthest. S2 and s3 are not
stored. The authors' symmetric codes begin with the scale `symu` of `lq.quantizers.rtn`, these with `symf`.

Not here: the authors' code can mix the inputs of a block, each number of which then is, with a probability of 1/2, the
original model's and not that of the quantized blocks before (as QDrop does). Here they are all of the latter.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lq.calibration.statistics import InputStats
from lq.numerics.spec import QuantSpec
from lq.quantizers.parametrization import (
    LearnedOptions,
    Parametrization,
    RoundedWeight,
    codes_of,
    range_scale,
    start_range,
    straight_through,
    whole_zero,
)
from lq.quantizers.reconstruct import reconstruct_block, reconstruct_matrix
from lq.quantizers.rtn import split_groups, stored_scale

LARGEST_DELTA = 3.0  # a factor of 20 either way; beyond it exp would soon overflow


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexRoundOptions(LearnedOptions):
    """`learning_rate` None is 0.01, for some hundreds of steps. The authors' setting for language models is 5000 steps
    of 2 windows of 2048 tokens at 0.003 for 4 bits and 0.0025 for 3, from the ranges `minmax`."""

    method: ClassVar[str] = "flexround"


def _init(weight: Float[Array, "K N"], spec: QuantSpec, options: FlexRoundOptions):
    low, high, shrink = start_range(weight, spec, options.start or "mse")
    scale = stored_scale(range_scale(low, high, shrink, spec), spec)
    theta = {
        "delta1": jnp.zeros_like(scale),
        "delta2": jnp.zeros_like(weight),
        "delta3": jnp.zeros_like(weight[0]),
    }
    return theta, {"scale": scale, "zero": whole_zero(shrink * low, scale, spec)}


def _round(theta, fixed, weight: Float[Array, "K N"], spec: QuantSpec, options: FlexRoundOptions) -> RoundedWeight:
    exact = fixed["scale"] * jnp.exp(theta["delta1"])
    scale = straight_through(exact, stored_scale(exact, spec))
    (grouped, _), (delta2, _) = split_groups(weight, spec), split_groups(theta["delta2"], spec)
    level = grouped / (scale * jnp.exp(delta2 + theta["delta3"]))
    return RoundedWeight(codes_of(level, fixed["zero"], spec), scale, fixed["zero"])


def _project(theta, fixed, options: FlexRoundOptions):
    return {name: jnp.clip(delta, -LARGEST_DELTA, LARGEST_DELTA) for name, delta in theta.items()}


def _optimizer(spec: QuantSpec, options: FlexRoundOptions) -> optax.GradientTransformation:
    rate = options.learning_rate or 1e-2
    return optax.adam(optax.cosine_decay_schedule(rate, max(options.steps, 1)))


FLEXROUND = Parametrization(init=_init, round=_round, project=_project, optimizer=_optimizer)


def flexround(weight: Float[Array, "... K N"], stats: InputStats | None, spec: QuantSpec, options: FlexRoundOptions):
    """FlexRound: rounding learned as a division by a positive matrix, to reconstruct each block's output.

    As a function of one matrix it reconstructs that matrix's outputs; see `lq.quantizers.reconstruct`.
    """
    return reconstruct_matrix(FLEXROUND, weight, stats, spec, options)


flexround_block = functools.partial(reconstruct_block, FLEXROUND)
