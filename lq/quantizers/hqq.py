"""Half-quadratic quantization: zero points that leave a sparse error, found without any calibration data.

For weights W of one group with scale s, the zero point z minimizes ||W - s (q - z)||_p^p with p < 1, a norm that
forgives a few large errors, and q = clip(round(W / s + z), 0, 2^b - 1). Half-quadratic splitting introduces E for the
error and alternates, from the z of min-max (`asymf` in `lq.quantizers.rtn`):

    E <- shrink(W - s (q - z)),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z <- mean over the group of q - (W - E) / s
    beta <- kappa beta

The scale stays what min-max gave. Errors below beta^(-1/(2-p)), 0.17 by default, are shrunk to zero; of weights of
ordinary size these are all, and a step moves z so that the group's errors, codes held, have mean zero.

Where this differs from the reference code (mobiusml/hqq, `core/optimize.py` and `core/quantize.py`):

- The scale is rounded to its stored dtype before the first step. The reference solves with the unrounded inverse scale,
  which it keeps below 2e4, and rounds afterwards.
- z stays within [0, 2^b], where the kernels can use it, at every step. A group on one side of 0, whose z would lie
  outside, has its range taken to 0; the reference follows it anywhere, and spends no codes on the gap.
- z is rounded at the end, to `spec.zero_dtype`, or to a code when that is None, and the codes are chosen with it. Write
  a zero_dtype: rounded to a code, a zero point loses all that was gained, and a little more than `asym0` has to lose.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (Mobius Labs, 2023).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.numerics.spec import QuantSpec
from lq.quantizers.rtn import FRACTIONAL, group_ranges, round_to_codes, round_zeros, split_groups, stored_zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQOptions:
    """The defaults are the reference's, `round_zero` excepted: it is true there when bits = 4."""

    p: float = 0.7  # of the norm
    beta: float = 10.0  # the weight of the quadratic term
    kappa: float = 1.0  # growth of beta; the reference lists 1.01, which its default solver leaves unused
    iterations: int = 20  # at most
    early_stop: bool = True  # after the first step that does not reduce the mean |error| of the whole matrix
    # Which z is kept: that of the last step (the reference), that of the least mean |error| of the matrix (its second
    # solver, with kappa 1.01), or in each group that of the group's own least.
    keep: Literal["last", "best", "best_in_group"] = "last"
    round_zero: bool = False  # begin with a whole z

    def check(self, spec: QuantSpec) -> None:
        """Raises UserError when the options are out of range, or `spec` has no zero points to optimize."""
        if spec.symmetric:
            raise UserError("hqq: optimizes zero points, and symmetric codes have none; write symmetric: false")
        for name, holds, wanted in (
            ("p", 0 < self.p <= 1, "a number above 0, 1 at most"),
            ("beta", self.beta > 0, "a number above 0"),
            ("kappa", self.kappa >= 1, "1, or a number above"),
            ("iterations", self.iterations >= 1, "1 or more"),
        ):
            if not holds:
                raise UserError(f"hqq: {name}: {getattr(self, name)}; write {wanted}")


def hqq(
    weight: Float[Array, "... K N"], stats: InputStats | None, spec: QuantSpec, options: HQQOptions
) -> tuple[Array, Array, Array | None]:
    """Zero points of the sparsest error, by half-quadratic splitting.

    Returns codes uint32 `[..., K, N]`, scales float32 `[..., groups, N]` and zeros of the same shape: float32 when
    `spec.zero_dtype` is set, otherwise uint32. Pure and jittable; `spec` and `options` are static. Needs no
    calibration: `stats` is ignored. Raises UserError for a symmetric spec.
    """
    del stats
    options.check(spec)
    if weight.ndim > 2:
        return jax.vmap(lambda w: hqq(w, None, spec, options))(weight)
    grouped, real = split_groups(weight.astype(jnp.float32), spec)
    # Unrounded: a dtype for zero points would round the first one.
    scale, zero = group_ranges(grouped, real, 1.0, dataclasses.replace(spec, zero_dtype=None), FRACTIONAL)
    zero = optimize_zeros(grouped, real, scale, jnp.round(zero) if options.round_zero else zero, spec, options)
    if spec.zero_dtype is None:
        zero = jnp.clip(jnp.round(zero), 0, spec.max_code)
    zero = round_zeros(zero, spec)
    codes = round_to_codes(grouped, scale, zero, spec)
    codes = codes.reshape(-1, weight.shape[-1])[: weight.shape[0]].astype(jnp.uint32)
    return codes, scale[:, 0], stored_zeros(zero[:, 0], spec)


class _State(NamedTuple):
    step: Array
    beta: Array
    improved: Array  # whether the last step reduced the mean |error| of the matrix
    zero: Array  # [groups, 1, N], as every array below
    best: Array  # the zero point that `keep` is after, and its mean |error|: of the group or of the matrix
    least: Array
    least_of_matrix: Array


def optimize_zeros(grouped, real, scale, zero, spec: QuantSpec, options: HQQOptions):
    """The zero points float32 `[groups, 1, N]` after at most `options.iterations` steps from `zero`, not rounded.

    Args:
      grouped, real: as `lq.quantizers.rtn.split_groups` gives them.
      scale, zero: float32 `[groups, 1, N]`.
    """
    count = real.sum(axis=1, keepdims=True)
    mean = lambda values: jnp.sum(values, axis=1, keepdims=True, where=real) / count  # noqa: E731
    share = count / real.sum()  # of a group in the mean over its column

    def tried(state: _State):
        """Codes and errors with the zero point at hand, and the state with that point judged."""
        codes = round_to_codes(grouped, scale, state.zero, spec)
        error = grouped - (codes - state.zero) * scale
        in_group = mean(jnp.abs(error))
        of_matrix = jnp.mean(jnp.sum(in_group * share, axis=0))
        judged = in_group if options.keep == "best_in_group" else jnp.full_like(in_group, of_matrix)
        better = judged < state.least
        return (codes, error), state._replace(
            improved=of_matrix < state.least_of_matrix,
            best=jnp.where(better, state.zero, state.best),
            least=jnp.minimum(judged, state.least),
            least_of_matrix=jnp.minimum(of_matrix, state.least_of_matrix),
        )

    def step(state: _State) -> _State:
        (codes, error), state = tried(state)
        kept = shrink(error, state.beta, options.p)
        zero = jnp.clip(mean(codes - (grouped - kept) / scale), 0, 2**spec.bits)
        return state._replace(step=state.step + 1, beta=options.kappa * state.beta, zero=zero)

    def unfinished(state: _State):
        stopped = ~state.improved if options.early_stop else False
        return (state.step < options.iterations) & ~jnp.asarray(stopped)

    infinite = jnp.full_like(zero, jnp.inf)
    start = _State(jnp.int32(0), jnp.float32(options.beta), jnp.bool_(True), zero, zero, infinite, jnp.float32(jnp.inf))
    final = jax.lax.while_loop(unfinished, step, start)
    return final.zero if options.keep == "last" else tried(final)[1].best


def shrink(x: Float[Array, "..."], beta, p: float) -> Float[Array, "..."]:
    """sign(x) max(|x| - |x|^(p-1) / beta, 0): approximately the e that minimizes |e|^p / p + beta (e - x)^2 / 2."""
    magnitude = jnp.abs(x)
    threshold = jnp.where(magnitude > 0, magnitude, 1.0) ** (p - 1) / beta
    return jnp.sign(x) * jnp.maximum(magnitude - threshold, 0.0)
