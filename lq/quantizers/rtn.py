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
from typing import ClassVar, Literal

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

    method: ClassVar[str] = "rtn"  # whose options these are

    convention: Literal["asym0", "asym", "symu", "symr", "symf"] | None = None  # None: asym0, or symf when symmetric
    clip: Literal["none", "mse"] = "mse"

    def resolve(self, spec: QuantSpec) -> str:
        """The convention for `spec`. Raises UserError when the option contradicts the spec."""
        if self.convention is None:
            return "symf" if spec.symmetric else "asym0"
        if (self.convention in SYMMETRIC) != spec.symmetric:
            kind, fitting = ("symmetric", SYMMETRIC) if spec.symmetric else ("asymmetric", ASYMMETRIC)
            raise UserError(
                f"{self.method}: convention {self.convention!r} does not fit {kind} codes; write {' or '.join(fitting)}"
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
    grouped, real = split_groups(weight.astype(jnp.float32), spec)
    scale, zero = find_ranges(grouped, real, spec, options)
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


def find_ranges(grouped, real, spec: QuantSpec, options: RTNOptions):
    """Scale and zero, each float32 `[groups, 1, N]`, as the options want them found; the scale as it is stored."""
    convention = options.resolve(spec)
    scale, zero = group_ranges(grouped, real, 1.0, spec, convention)
    if options.clip == "mse":
        return _search_clip(grouped, real, scale, zero, spec, convention)
    return scale, zero


def group_ranges(grouped, real, shrink, spec: QuantSpec, convention: str):
    """Scale (already rounded to its stored dtype, as float32) and zero, each `[groups, 1, N]`, of the shrunk range."""
    low = jnp.min(grouped, axis=1, keepdims=True, where=real, initial=jnp.inf)
    high = jnp.max(grouped, axis=1, keepdims=True, where=real, initial=-jnp.inf)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    if convention == "asym0":
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if convention in ASYMMETRIC:
        scale = _stored(jnp.maximum(shrink * (high - low), SMALLEST_RANGE) / spec.max_code, spec)
        zero = jnp.clip(jnp.round(-shrink * low / scale), 0, spec.max_code)
        return scale, zero
    largest = jnp.maximum(shrink * largest, SMALLEST_RANGE)
    if spec.bits == 1 or convention == "symu":
        scale = 2.0 * largest / spec.max_code
    elif convention == "symr":
        scale = largest / (2 ** (spec.bits - 1) - 1)
    else:
        scale = jnp.where(high > -low, -largest, largest) / 2 ** (spec.bits - 1)
    return _stored(scale, spec), jnp.full_like(scale, spec.zero_point)


def round_to_codes(grouped, scale, zero, spec: QuantSpec):
    """clip(round(x / s + z)): with a whole z this is round(x / s) + z; at z = 1/2 it is the sign."""
    level = grouped / scale
    level = jnp.round(level) + zero if spec.zero_point != 0.5 or not spec.symmetric else jnp.floor(level) + 1.0
    return jnp.clip(level, 0, spec.max_code)


def _stored(scale, spec: QuantSpec):
    """The scale as it will be read back.

    None underflows to zero: the smallest, SMALLEST_RANGE / 255 = 3.9e-8, is nearer to the smallest float16, a subnormal
    of 6.0e-8. On a device that flushes subnormals to zero such a scale becomes the smallest normal number.
    """
    dtype = jnp.dtype(spec.scale_dtype)
    stored = scale.astype(dtype).astype(jnp.float32)
    tiny = float(jnp.finfo(dtype).tiny)
    return jnp.where(stored == 0, jnp.copysign(tiny, scale), stored)


def _search_clip(grouped, real, scale, zero, spec: QuantSpec, convention: str):
    def error(scale, zero):
        codes = round_to_codes(grouped, scale, zero, spec)
        return jnp.sum(jnp.abs((codes - zero) * scale - grouped) ** CLIP_NORM, axis=1, keepdims=True, where=real)

    def step(i, best):
        least, best_scale, best_zero = best
        s, z = group_ranges(grouped, real, 1.0 - i / 100, spec, convention)
        e = error(s, z)
        better = e < least
        return jnp.where(better, e, least), jnp.where(better, s, best_scale), jnp.where(better, z, best_zero)

    return jax.lax.fori_loop(1, CLIP_STEPS, step, (error(scale, zero), scale, zero))[1:]
