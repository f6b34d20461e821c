"""AutoRound (Cheng et al., arXiv 2309.05516; code intel/auto-round): rounding offsets and ranges by signed descent.

Per weight an offset V, per group the factors alpha and beta of the range's upper and lower end:

    s = (alpha max(W, 0) - beta min(W, 0)) / (2^b - 1)        z = round(-beta min(W, 0) / s)
    q = clip(round(W / s + V) + z, 0, 2^b - 1)                W^ = s (q - z)

V starts at 0 and alpha = beta = 1, so that no steps are round to nearest. Symmetric codes take their signed scale from
the end of larger magnitude (`symf` in `lq.quantizers.rtn`). Every step moves each number by the learning rate against
the sign of its gradient; the rate falls linearly to zero, and with 1 / steps to begin with, offsets sum to no more than
(steps + 1) / (2 steps), half a code. The authors keep the step of least loss (`keep`).
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoRoundOptions(LearnedOptions):
    """The authors' presets, with keep="best", on windows of 2048 tokens, 8 a step: 200 steps (128 windows); best 1000
    (512 windows); light 50 steps at a learning rate of 0.005. `learning_rate` None is 1 / steps; 2 / steps from 1000
    steps on at 3 bits and less."""

    method: ClassVar[str] = "autoround"

    tune_range: bool = True  # learn alpha and beta


def _init(weight: Float[Array, "K N"], spec: QuantSpec, options: AutoRoundOptions):
    # As the authors, and at 2 bits better than the searched ranges; at one bit the ends would be the only levels.
    start = options.start or ("minmax" if spec.bits > 1 else "mse")
    low, high, shrink = start_range(weight, spec, start)
    ends = {"alpha": jnp.ones_like(high), "beta": jnp.ones_like(low)}
    fixed = {"low": low, "high": high, "shrink": shrink}
    theta = {"V": jnp.zeros_like(weight)}
    return (theta | ends, fixed) if options.tune_range else (theta, fixed | ends)


def _round(theta, fixed, weight: Float[Array, "K N"], spec: QuantSpec, options: AutoRoundOptions) -> RoundedWeight:
    ends = theta if options.tune_range else fixed
    low, high = ends["beta"] * fixed["low"], ends["alpha"] * fixed["high"]
    exact = range_scale(low, high, fixed["shrink"], spec)
    scale = straight_through(exact, stored_scale(exact, spec))
    low = fixed["shrink"] * low
    zero = whole_zero(low, scale, spec)
    if not spec.symmetric:
        zero = straight_through(-low / scale, zero)
    (grouped, _), (offset, _) = split_groups(weight, spec), split_groups(theta["V"], spec)
    return RoundedWeight(codes_of(grouped / scale + offset, zero, spec), scale, zero)


def _project(theta, fixed, options: AutoRoundOptions):
    """A range may grow to that of the weights and no further."""
    if not options.tune_range:
        return theta
    return theta | {end: jnp.clip(theta[end], 0.0, 1.0 / fixed["shrink"]) for end in ("alpha", "beta")}


def _optimizer(spec: QuantSpec, options: AutoRoundOptions) -> optax.GradientTransformation:
    steps = max(options.steps, 1)
    rate = options.learning_rate
    if rate is None:
        rate = 2.0 / steps if steps >= 1000 and spec.bits <= 3 else 1.0 / steps
    return optax.sign_sgd(optax.linear_schedule(rate, 0.0, steps))


AUTOROUND = Parametrization(init=_init, round=_round, project=_project, optimizer=_optimizer)


def autoround(weight: Float[Array, "... K N"], stats: InputStats | None, spec: QuantSpec, options: AutoRoundOptions):
    """AutoRound: rounding offsets and ranges learned by signed gradients, to reconstruct each block's output.

    As a function of one matrix it reconstructs that matrix's outputs; see `lq.quantizers.reconstruct`.
    """
    return reconstruct_matrix(AUTOROUND, weight, stats, spec, options)


autoround_block = functools.partial(reconstruct_block, AUTOROUND)
