"""AdaQuant (Hubara et al., arXiv 2006.10518; code itayhubara/CalibTIP): weights, ranges and offsets moved together.

A continuous change V of the weights, and the range r and lower end l of every group, are all learned:

    s = r / (2^b - 1)        z = round(-l / s)        W^ = s (clip(round((W + V) / s) + z, 0, 2^b - 1) - z)

where z is not rounded to a whole number if the spec stores zero points as numbers. V starts at 0 with the range of
round to nearest, which is therefore what no steps give. Adam has a rate of its own for the weights and for the ranges,
both in units of the scale and range at the start; the published ones, 1e-5 and 1e-3 as they stand, are for vision
models. They are constant there. Here they fall to zero along a cosine: at a constant rate the codes of the last step
are still those of a random walk, and a block's error is more than twice as large.

The original works layer by layer, each towards its own output, which is `unit="matrix"` here; the default is a block at
once. It also learns a bias for every layer, and the ranges of quantized activations. Here no bias is learned (see
`lq.quantizers.bias` for a closed form), and activations stay as they are.
"""

import dataclasses
import functools
from collections.abc import Hashable
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
from lq.quantizers.rtn import round_zeros, split_groups, stored_scale

LEAST_RANGE = 1e-2  # of the range at the start: it is never driven through zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaQuantOptions(LearnedOptions):
    """`learning_rate` is that of the weights, in scales per step; None is 0.01."""

    method: ClassVar[str] = "adaquant"

    range_learning_rate: float = 1e-3  # of ranges and offsets, in ranges per step

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.range_learning_rate < float("inf"):
            self._refuse("range_learning_rate", "a number from 0")


def _init(weight: Float[Array, "K N"], spec: QuantSpec, options: AdaQuantOptions):
    low, high, shrink = start_range(weight, spec, options.start or "mse")
    scale = range_scale(low, high, shrink, spec)
    theta = {"V": jnp.zeros_like(weight), "range": jnp.ones_like(scale)}
    if not spec.symmetric:
        theta["offset"] = jnp.zeros_like(scale)
    return theta, {"scale": scale, "low": shrink * low}


def _round(theta, fixed, weight: Float[Array, "K N"], spec: QuantSpec, options: AdaQuantOptions) -> RoundedWeight:
    exact = fixed["scale"] * theta["range"]
    scale = straight_through(exact, stored_scale(exact, spec))
    (grouped, _), (change, _) = split_groups(weight, spec), split_groups(theta["V"], spec)
    zero = _zero(theta, fixed, scale, spec)
    return RoundedWeight(codes_of((grouped + fixed["scale"] * change) / scale, zero, spec), scale, zero)


def _zero(theta, fixed, scale, spec: QuantSpec):
    if spec.symmetric:
        return whole_zero(fixed["low"], scale, spec)
    low = fixed["low"] + theta["offset"] * spec.max_code * fixed["scale"]
    exact = -low / scale
    if spec.zero_dtype is None:
        return straight_through(exact, whole_zero(low, scale, spec))
    return straight_through(exact, round_zeros(exact, spec))


def _project(theta, fixed, options: AdaQuantOptions):
    return theta | {"range": jnp.maximum(theta["range"], LEAST_RANGE)}


def _optimizer(spec: QuantSpec, options: AdaQuantOptions) -> optax.GradientTransformation:
    falling = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, max(options.steps, 1)))  # noqa: E731
    kinds: dict[Hashable, optax.GradientTransformation]
    kinds = {"weight": falling(options.learning_rate or 1e-2), "range": falling(options.range_learning_rate)}
    return optax.multi_transform(kinds, lambda theta: {name: "weight" if name == "V" else "range" for name in theta})


ADAQUANT = Parametrization(init=_init, round=_round, project=_project, optimizer=_optimizer)


def adaquant(weight: Float[Array, "... K N"], stats: InputStats | None, spec: QuantSpec, options: AdaQuantOptions):
    """AdaQuant: weights, ranges and zero points learned together by Adam, to reconstruct each block's output.

    As a function of one matrix it reconstructs that matrix's outputs; see `lq.quantizers.reconstruct`.
    """
    return reconstruct_matrix(ADAQUANT, weight, stats, spec, options)


adaquant_block = functools.partial(reconstruct_block, ADAQUANT)
