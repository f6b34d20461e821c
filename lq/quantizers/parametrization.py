"""What a learned rounding consists of: trainable numbers, and the codes, scales and zero points they stand for.

A `Parametrization` maps its trainable numbers theta to a `RoundedWeight`; the weight used in training and what is
stored are both read off it, so that they cannot differ. Rounding is straight-through: the value is rounded, the
gradient is that of the number before rounding (Bengio et al., arXiv 1308.3432). A code that was clipped has none. The
scale is rounded to its stored dtype in here, so that training sees the scale that will be read back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lq.errors import UserError
from lq.numerics.spec import QuantSpec
from lq.quantizers.rtn import (
    RTNOptions,
    asymmetric_scale,
    nearest_code,
    search_shrink,
    split_groups,
    stored_zeros,
    symmetric_scale,
)
from lq.registry import refuse_idle

Theta = Any  # a pytree of float32 arrays
Exported = tuple[Array, Array, Array | None]  # codes, scales, zeros, as every quantizer returns them


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedOptions:
    """What all learned roundings have in common.

    The defaults are for windows of some hundreds of tokens and were chosen on blocks of the shipped model, by the error
    on windows that were not learned from. Two windows a step are as good as eight at a quarter of the time, one is a
    little worse. The last step is better than the one of least loss, which is that of the luckiest windows.
    """

    method: ClassVar[str]  # whose options these are

    steps: int = 200  # of the optimizer
    batch_size: int = 2  # calibration windows per step
    learning_rate: float | None = None  # None: the method's own
    # The ranges begun with: the weights', or those of the clipping search; None: "mse", but for AutoRound
    start: Literal["minmax", "mse"] | None = None
    seed: int = 0  # draws the windows of every step
    keep: Literal["last", "best"] = "last"  # the last step, or the one of least loss on the windows it drew
    guard: bool = True  # fall back on the start where its error over all calibration windows is less
    unit: Literal["block", "matrix"] = "block"  # what is reconstructed: a block's output, or each matrix's alone
    propagate: bool = True  # a block's inputs have come through the quantized blocks before it

    def __post_init__(self):
        for name, least in (("steps", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                self._refuse(name, f"{least} or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            self._refuse("learning_rate", "a number above 0, or null for the method's own")
        if self.unit == "matrix":
            why = "with unit: matrix every step sees all tokens, and the best is kept"
            refuse_idle(self, self.method, ("batch_size", "seed", "keep", "guard"), why)

    def _refuse(self, option: str, instead: str):
        raise UserError(f"{self.method}: option {option}: {getattr(self, option)}; write {instead}")


class RoundedWeight(NamedTuple):
    """Codes of one matrix, whole numbers in float32, with the gradients of what they were rounded from."""

    code: Float[Array, "groups g N"]  # the last group padded
    scale: Float[Array, "groups 1 N"]  # rounded to the stored dtype
    zero: Float[Array, "groups 1 N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
    """Four pure functions on one matrix `[K, N]`. Hashable: a static argument of the jitted loop.

    The last axis of every array of theta is that of the output channels, N.
    """

    init: Callable[[Array, QuantSpec, Any], tuple[Theta, Any]]  # weight -> theta, and what stays fixed
    round: Callable[[Theta, Any, Array, QuantSpec, Any], RoundedWeight]  # theta, fixed, weight -> codes
    project: Callable[[Theta, Any, Any], Theta]  # theta, fixed, options -> the nearest theta that is allowed
    optimizer: Callable[[QuantSpec, Any], optax.GradientTransformation]


def initial(method: Parametrization, weight: Float[Array, "... K N"], spec: QuantSpec, options) -> tuple[Theta, Any]:
    """Theta at the start, and what stays fixed; for a stack of experts with a leading axis on every array."""
    return _per_expert(lambda w: method.init(w, spec, options), weight.ndim)(weight)


def fake_quant(
    method: Parametrization, theta: Theta, fixed, weight: Float[Array, "... K N"], spec: QuantSpec, options
) -> Float[Array, "... K N"]:
    """The dequantized weight, differentiable in theta; equal to what `export` gives, dequantized."""

    def one(theta, fixed, weight):
        code, scale, zero = method.round(theta, fixed, weight, spec, options)
        return ((code - zero) * scale).reshape(-1, weight.shape[-1])[: weight.shape[0]]

    return _per_expert(one, weight.ndim)(theta, fixed, weight)


def export(
    method: Parametrization, theta: Theta, fixed, weight: Float[Array, "... K N"], spec: QuantSpec, options
) -> Exported:
    """Codes uint32 `[..., K, N]`, scales float32 and zeros `[..., groups, N]`, as `rtn` returns them."""

    def one(theta, fixed, weight):
        code, scale, zero = method.round(theta, fixed, weight, spec, options)
        codes = code.reshape(-1, weight.shape[-1])[: weight.shape[0]].astype(jnp.uint32)
        return codes, scale[:, 0], stored_zeros(zero[:, 0], spec)

    return _per_expert(one, weight.ndim)(theta, fixed, weight)


def start_range(weight: Float[Array, "K N"], spec: QuantSpec, start: Literal["minmax", "mse"]):
    """`(low, high, shrink)`, each `[groups, 1, N]`: the ends of a group's range and the factor it is shrunk by."""
    grouped, real = split_groups(weight, spec)
    low = jnp.minimum(jnp.min(grouped, axis=1, keepdims=True, where=real, initial=jnp.inf), 0.0)
    high = jnp.maximum(jnp.max(grouped, axis=1, keepdims=True, where=real, initial=-jnp.inf), 0.0)
    if start == "minmax":
        return low, high, jnp.ones_like(low)
    return low, high, search_shrink(grouped, real, spec, RTNOptions(convention=convention(spec), clip="mse"))


def convention(spec: QuantSpec) -> Literal["symf", "asym0"]:
    """Of `rtn`: the ranges that all learned roundings begin with. Zero is one of the values of every group."""
    return "symf" if spec.symmetric else "asym0"


def range_scale(low, high, shrink, spec: QuantSpec):
    """The scale whose codes span a group's shrunk range, before it is rounded to its stored dtype."""
    if spec.symmetric:
        return symmetric_scale(low, high, shrink, spec, convention(spec))
    return asymmetric_scale(low, high, shrink, spec)


def whole_zero(low, scale, spec: QuantSpec):
    """The code that stands for zero in a range that begins at `low`."""
    if spec.symmetric:
        return jnp.full_like(scale, spec.zero_point)
    return jnp.clip(jnp.round(-low / scale), 0, spec.max_code)


@jax.custom_jvp
def straight_through(exact: Array, rounded: Array) -> Array:
    """The value of `rounded` with the gradient of `exact`."""
    del exact
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def codes_of(level, zero, spec: QuantSpec):
    """The codes of levels w / s, in float32, with the gradient of level + zero; none where they are clipped."""
    nearest = jax.lax.stop_gradient(nearest_code(level, zero, spec.max_code))
    inside = (nearest >= 0) & (nearest <= spec.max_code)
    return jnp.where(inside, straight_through(level + zero, nearest), jnp.clip(nearest, 0, spec.max_code))


def _per_expert(function: Callable, ndim: int) -> Callable:
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return function
