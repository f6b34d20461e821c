"""Round to nearest, with the range conventions and the clipping search found in published code.

For one group x (the weights that share a scale), with q_max = 2^b - 1 and A = max|x|:

    convention  scale s                                zero z          stands for       used by
    asym0       (max(x,0) - min(x,0)) / q_max          round(-min/s)   min-max with 0   GPTQ, CalibTIP
    asym        (max(x) - min(x)) / q_max              round(-min/s)   raw min-max      AWQ
    symu        2A / q_max                             middle code     absmax           GPTQ sym
    symr        A / (2^(b-1) - 1)                      middle code     absmax           AWQ sym, QuaRot
    symf        -x_ext / 2^(b-1), x_ext the signed     middle code     absmax, signed   AutoRound, llama.cpp
                element of largest magnitude                           scale

The code of x is clip(round(x / s) + z, 0, q_max) and stands for s (q - z). Rounding is half to even. At one bit the
symmetric conventions coincide: the two codes stand for -A and +A, scale 2A, zero 1/2.

`clip="mse"` searches the range: both ends are shrunk by p = 1, 0.99, ... 0.21 and the p with the least sum of
|error|^2.4 is kept, per group (GPTQ's `find_params(mse=True)`: Frantar et al., arXiv 2210.17323, reference code).

Scales are rounded to the stored dtype first and codes are chosen with the rounded ones.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.errors import UserError
from lq.numerics.spec import QuantSpec

SYMMETRIC = ("symu", "symr", "symf")
ASYMMETRIC = ("asym0", "asym")
CLIP_STEPS, CLIP_NORM = 80, 2.4
SMALLEST_RANGE = 1e-5  # a group whose range is below this gets this range


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTNOptions:
    """How ranges are chosen."""

    convention: Literal["asym0", "asym", "symu", "symr", "symf"] | None = None  # None: asym0, or symf when symmetric
    clip: Literal["none", "mse"] = "mse"

    def resolve(self, spec: QuantSpec) -> str:
        """The convention for `spec`. Raises UserError when the option contradicts the spec."""
        if self.convention is None:
            return "symf" if spec.symmetric else "asym0"
        if (self.convention in SYMMETRIC) != spec.symmetric:
            kind, fitting = ("symmetric", SYMMETRIC) if spec.symmetric else ("asymmetric", ASYMMETRIC)
            raise UserError(
                f"rtn: convention {self.convention!r} does not fit {kind} codes; write {' or '.join(fitting)}"
            )
        return self.convention


def rtn(weight: Float[Array, "... K N"], stats: None, spec: QuantSpec, options: RTNOptions):
    """Round to nearest within a range chosen per group.

    Returns codes uint32 `[..., K, N]`, scales float32 `[..., groups, N]` and zeros uint32 of the same shape (None:
    symmetric). Pure and jittable; `spec` and `options` are static. Needs no calibration: `stats` is ignored.
    """
    del stats
    if weight.ndim > 2:
        return jax.vmap(lambda w: rtn(w, None, spec, options))(weight)
    convention = options.resolve(spec)
    grouped, real = split_groups(weight.astype(jnp.float32), spec)
    shrink = search_shrink(grouped, real, spec, convention) if options.clip == "mse" else 1.0
    scale, zero = group_ranges(grouped, real, shrink, spec, convention)
    codes = round_to_codes(grouped, scale, zero, spec)
    codes = codes.reshape(-1, weight.shape[-1])[: weight.shape[0]].astype(jnp.uint32)
    zeros = None if spec.symmetric else zero[:, 0].astype(jnp.uint32)
    return codes, scale[:, 0], zeros


def split_groups(weight: Float[Array, "K N"], spec: QuantSpec):
    """`[groups, g, N]`, the last group padded with zeros, and the mask `[groups, g, 1]` of real rows."""
    K, N = weight.shape
    g, groups = spec.group_length(K), spec.num_groups(K)
    padded = jnp.pad(weight, ((0, groups * g - K), (0, 0))).reshape(groups, g, N)
    return padded, (jnp.arange(groups * g) < K).reshape(groups, g, 1)


def group_ranges(grouped, real, shrink, spec: QuantSpec, convention: str):
    """Scale (already rounded to its stored dtype, as float32) and zero, each `[groups, 1, N]`, of the shrunk range."""
    low, high = group_extremes(grouped, real, convention)
    scale = stored_scale(range_scale(low, high, shrink, spec, convention), spec)
    return scale, range_zero(shrink * low, scale, spec)


def group_extremes(grouped, real, convention: str):
    """Least and greatest weight of each group, `[groups, 1, N]`; `asym0` counts zero as one of them."""
    low = jnp.min(grouped, axis=1, keepdims=True, where=real, initial=jnp.inf)
    high = jnp.max(grouped, axis=1, keepdims=True, where=real, initial=-jnp.inf)
    if convention == "asym0":
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    return low, high


def range_scale(low, high, shrink, spec: QuantSpec, convention: str):
    """The scale whose codes span the shrunk range, not yet rounded to its stored dtype."""
    if convention in ASYMMETRIC:
        return jnp.maximum(shrink * (high - low), SMALLEST_RANGE) / spec.max_code
    largest = jnp.maximum(shrink * jnp.maximum(jnp.abs(low), jnp.abs(high)), SMALLEST_RANGE)
    if spec.bits == 1 or convention == "symu":
        return 2.0 * largest / spec.max_code
    if convention == "symr":
        return largest / (2 ** (spec.bits - 1) - 1)
    return jnp.where(high >= -low, -largest, largest) / 2 ** (spec.bits - 1)


def range_zero(low, scale, spec: QuantSpec):
    """The code that stands for zero, a whole number; the constant one when symmetric."""
    if spec.symmetric:
        return jnp.full_like(scale, spec.zero_point)
    return jnp.clip(jnp.round(-low / scale), 0, spec.max_code)


def round_to_codes(grouped, scale, zero, spec: QuantSpec):
    """The codes of weights, clipped to those there are."""
    return jnp.clip(nearest_code(grouped / scale, zero, spec), 0, spec.max_code)


def nearest_code(level, zero, spec: QuantSpec):
    """round(x / s) + z for the level x / s, not clipped; at z = 1/2 it is the sign, as code 0 or 1."""
    if spec.symmetric and spec.zero_point == 0.5:
        return jnp.floor(level) + 1.0
    return jnp.round(level) + zero


def stored_scale(scale, spec: QuantSpec):
    """The scale as it will be read back, in float32.

    None underflows to zero: the smallest, SMALLEST_RANGE / 255 = 3.9e-8, is nearer to the smallest float16, a subnormal
    of 6.0e-8. On a device that flushes subnormals to zero such a scale becomes the smallest normal number.
    """
    dtype = jnp.dtype(spec.scale_dtype)
    stored = scale.astype(dtype).astype(jnp.float32)
    tiny = float(jnp.finfo(dtype).tiny)
    return jnp.where(stored == 0, jnp.copysign(tiny, scale), stored)


def search_shrink(grouped, real, spec: QuantSpec, convention: str):
    """The factor p of the clipping search, `[groups, 1, N]`: the largest among those of least error."""

    def error(shrink):
        scale, zero = group_ranges(grouped, real, shrink, spec, convention)
        codes = round_to_codes(grouped, scale, zero, spec)
        return jnp.sum(jnp.abs((codes - zero) * scale - grouped) ** CLIP_NORM, axis=1, keepdims=True, where=real)

    def step(i, best):
        least, chosen = best
        shrink = 1.0 - i / 100
        e = error(shrink)
        return jnp.minimum(e, least), jnp.where(e < least, shrink, chosen)

    least = error(1.0)
    return jax.lax.fori_loop(1, CLIP_STEPS, step, (least, jnp.ones_like(least)))[1]
