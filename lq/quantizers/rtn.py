"""Round to nearest, with the range conventions and the clipping searches found in published code.

For one group x (the weights that share a scale), with n = 2^b - 1, A = max|x| and x_ext the element of magnitude A:

    convention  scale s                    zero z                    range                 used by
    asym0       (max(x,0) - min(x,0)) / n  round(-min/s)             min-max with 0        GPTQ, AutoRound asym, torchao
    asym        (max - min) / n            round(-min/s)             min-max               AWQ
    asymf       (max - min) / n            -min/s, not rounded       min-max               Quanto, hqq's first step
    mlx         -x_ext / z (signed)        round(n A / (max - min))  min-max, keeps x_ext  MLX
    symu        2A / n                     middle code               -A to A               GPTQ sym, torchao
    symr        A / (2^(b-1) - 1)          middle code               -A to A               AWQ sym, QuaRot
    symf        -x_ext / 2^(b-1) (signed)  middle code               -A to A, keeps x_ext  AutoRound sym, llama.cpp

The code of x is clip(round(x / s) + z, 0, n) and stands for s (q - z); with a fraction in z it is
clip(round(x / s + z), 0, n). Rounding is half to even. At one bit the symmetric conventions coincide: the two codes
stand for -A and +A, scale 2A, zero 1/2.

A zero point is a code, 0 to n, or a number from 0 to 2^b where the spec has a `zero_dtype`; only `asymf` makes use of
the fractions, the others store whole numbers there. What that does to a group on one side of 0, whose own zero point
would lie outside: `asym` clips it and loses the far end of the range, as AWQ's code does; `asymf` and `mlx`, whose
originals let it lie anywhere, take the range to 0 instead, as `asym0` does. MLX stores a bias -s z and no zero point:
of a group with 0 inside, its z is a whole number from 2^(b-1) to n.

The clipping search (`clip`) multiplies the range by each of the factors p, and the p of least error is kept, per group:

    mse         p = 1, 0.99, ... 0.21                     sum |error|^2.4         GPTQ's `find_params(mse=True)`
    opt         1/p = 1 +- 0.0075 i, i = 0 ... 100        sum h_k error^2         AutoRound's opt-RTN, of its `symf`
                1/p = 1 +- 0.005 i, i = 0 ... 90 at 2 bit

h_k is 1, or with `importance` the mean square of input k on calibration text (llama.cpp's importance matrix).

Scales and zero points are rounded to the stored dtype first and codes are chosen with the rounded ones.

Sources: GPTQ, Frantar et al., arXiv 2210.17323, and its `quant.py`; AWQ, Lin et al., arXiv 2306.00978; AutoRound, Cheng
et al., arXiv 2309.05516, `data_type/int.py`; MLX's `mx.quantize`; hqq's and Quanto's packages.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.numerics.spec import QuantSpec
from lq.quantizers.gain import unit_gain

SYMMETRIC = ("symu", "symr", "symf")
ASYMMETRIC = ("asym0", "asym", "mlx")  # of whole zero points
FRACTIONAL = "asymf"
SMALLEST_RANGE = 1e-5  # a group whose range is below this gets this range


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeOptions:
    """How ranges are chosen."""

    method: ClassVar[str]  # whose options these are

    # None: symf when symmetric, asymf when the spec has a zero_dtype, otherwise asym0
    convention: Literal["asym0", "asym", "asymf", "mlx", "symu", "symr", "symf"] | None = None
    clip: Literal["none", "mse", "opt"] = "mse"
    unit_gain: bool = False  # scales give back what rounding takes from the size of the outputs (`lq.quantizers.gain`)

    def resolve(self, spec: QuantSpec) -> str:
        """The convention for `spec`. Raises UserError when the option contradicts the spec."""
        if self.convention is None:
            return "symf" if spec.symmetric else "asym0" if spec.zero_dtype is None else FRACTIONAL
        if (self.convention in SYMMETRIC) != spec.symmetric:
            kind, fitting = ("symmetric", SYMMETRIC) if spec.symmetric else ("asymmetric", ASYMMETRIC)
            raise UserError(
                f"{self.method}: convention {self.convention!r} does not fit {kind} codes; write {' or '.join(fitting)}"
            )
        if self.convention == FRACTIONAL and spec.zero_dtype is None:
            raise UserError(
                f"{self.method}: convention 'asymf' has zero points that are no codes; "
                "write a zero_dtype, or asym0 or asym"
            )
        return self.convention

    def fractional(self, spec: QuantSpec) -> bool:
        """Whether zero points are chosen that are no codes."""
        return self.resolve(spec) == FRACTIONAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTNOptions(RangeOptions):
    """How ranges are chosen, and by what."""

    method: ClassVar[str] = "rtn"

    importance: bool = False  # clip "opt" weighs errors by the inputs' mean squares, which takes calibration text

    def __post_init__(self):
        if self.importance and self.clip != "opt":
            raise UserError(f"rtn: option importance: it weighs errors of clip opt, not {self.clip}; write clip: opt")

    def check(self, spec: QuantSpec) -> None:
        """Raises UserError when an option contradicts the spec."""
        self.resolve(spec)
        if spec.ordered and not self.importance:
            raise UserError(
                f"{'by_energy' if spec.by_energy else 'widths'}: groups of channels by the energy of the inputs, which "
                "rtn does not look at; write its options clip: opt and importance: true, or the method gptq"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Of the inputs."""
        return frozenset({"calibration", "square"}) if self.importance else frozenset()


def rtn(
    weight: Float[Array, "... K N"], stats: InputStats | None, spec: QuantSpec, options: RTNOptions
) -> tuple[Array, Array, Array | None]:
    """Round to nearest within a range chosen per group.

    Returns codes uint32 `[..., K, N]`, scales float32 `[..., groups, N]` and zeros of the same shape: uint32, float32
    when `spec.zero_dtype` is set, None when symmetric. Pure and jittable; `spec` and `options` are static.

    Needs no calibration but with `options.importance`; then `stats` has a `square`, and UserError is raised otherwise.
    """
    if weight.ndim > 2:
        return jax.vmap(lambda w, s: rtn(w, s, spec, options))(weight, stats)
    grouped, real = split_groups(weight.astype(jnp.float32), spec)
    importance = None
    if options.importance:
        if stats is None or stats.square is None:
            raise UserError("rtn: importance is that of the inputs; give calibration data, or write importance: false")
        importance = split_groups(stats.square[:, None], spec)[0]
    scale, zero = find_ranges(grouped, real, spec, options, importance)
    codes = round_to_codes(grouped, scale, zero, spec)
    if options.unit_gain:
        gain = unit_gain(grouped, (codes - zero) * scale, 1.0 if importance is None else importance)
        scale = stored_scale(scale * gain, spec)
    codes = codes.reshape(-1, weight.shape[-1])[: weight.shape[0]].astype(jnp.uint32)
    return codes, scale[:, 0], stored_zeros(zero[:, 0], spec)


def split_groups(weight: Float[Array, "K N"], spec: QuantSpec):
    """`[groups, g, N]`, the last group padded with zeros, and the mask `[groups, g, 1]` of real rows."""
    K, N = weight.shape
    g, groups = spec.group_length(K), spec.num_groups(K)
    padded = jnp.pad(weight, ((0, groups * g - K), (0, 0))).reshape(groups, g, N)
    return padded, (jnp.arange(groups * g) < K).reshape(groups, g, 1)


def find_ranges(grouped, real, spec: QuantSpec, options: RangeOptions, importance=None):
    """Scale and zero as `group_ranges` gives them, of the ranges that the options ask for.

    `importance` `[groups, g, 1]` is the h_k of `clip="opt"`; None: all channels count alike.
    """
    convention = options.resolve(spec)
    shrink = 1.0
    if options.clip != "none":
        shrink = search_shrink(grouped, real, spec, options, importance)
    return group_ranges(grouped, real, shrink, spec, convention)


def group_ranges(grouped, real, shrink, spec: QuantSpec, convention: str):
    """Scale and zero, each float32 `[groups, 1, N]`, of the range times `shrink`.

    The scale is already rounded to its stored dtype, and so is a zero point to `spec.zero_dtype`; with none, those of
    `asymf` are left as they are.
    """
    low = jnp.min(grouped, axis=1, keepdims=True, where=real, initial=jnp.inf)
    high = jnp.max(grouped, axis=1, keepdims=True, where=real, initial=-jnp.inf)
    if spec.symmetric:
        scale = stored_scale(symmetric_scale(low, high, shrink, spec, convention), spec)
        return scale, jnp.full_like(scale, spec.zero_point)
    if convention == "asym0":
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    elif convention == FRACTIONAL:
        # 0 <= -low / s <= 2^b, solved for the ends of the range.
        beyond = (low > 0) | (high < low / 2**spec.bits)
        low = jnp.where(beyond, jnp.minimum(low, 0.0), low)
        high = jnp.where(beyond, jnp.maximum(high, 0.0), high)
    if convention == "mlx":
        length = jnp.maximum(shrink * (high - low), SMALLEST_RANGE)
        edge = jnp.maximum(shrink * jnp.maximum(-low, high), SMALLEST_RANGE)
        zero = jnp.clip(jnp.round(spec.max_code * edge / length), 1, spec.max_code)
        return stored_scale(jnp.where(-low > high, edge, -edge) / zero, spec), zero
    scale = stored_scale(asymmetric_scale(low, high, shrink, spec), spec)
    zero = -shrink * low / scale
    if convention == FRACTIONAL:
        return scale, round_zeros(zero, spec)
    return scale, jnp.clip(jnp.round(zero), 0, spec.max_code)


def round_to_codes(grouped, scale, zero, spec: QuantSpec):
    """clip(round(x / s + z)), as floats. With a whole z this is round(x / s) + z, at one symmetric bit the sign."""
    return jnp.clip(nearest_code(grouped / scale, zero, spec.max_code), 0, spec.max_code)


def nearest_code(level, zero, top):
    """round(level + z), not clipped, for the level x / s, where codes go from 0 to `top`: a number, or one per channel.

    Two codes about 0 are the sign, and 0 counts as positive.
    """
    whole = jnp.floor(zero)  # apart, so that a tie goes to the even multiple of s whether or not z is stored as a code
    nearest = jnp.round(level + (zero - whole)) + whole
    if isinstance(top, int) and top > 1:
        return nearest
    return jnp.where((zero == 0.5) & (top == 1), jnp.floor(level) + 1.0, nearest)


def round_zeros(zero, spec: QuantSpec):
    """A zero point within what may be stored, [0, 2^b], as it will be read back from `spec.zero_dtype`."""
    zero = jnp.clip(zero, 0.0, 2.0**spec.bits)
    return zero if spec.zero_dtype is None else zero.astype(spec.zero_dtype).astype(jnp.float32)


def stored_zeros(zero: Float[Array, "groups N"], spec: QuantSpec) -> Array | None:
    """What a quantizer returns for its zero points: see `rtn`."""
    if spec.symmetric:
        return None
    return zero.astype(jnp.uint32) if spec.zero_dtype is None else zero


def asymmetric_scale(low, high, shrink, spec: QuantSpec):
    """The scale whose codes span the shrunk range, before it is rounded to its stored dtype."""
    return jnp.maximum(shrink * (high - low), SMALLEST_RANGE) / spec.max_code


def symmetric_scale(low, high, shrink, spec: QuantSpec, convention: str):
    """The same of a symmetric convention."""
    largest = jnp.maximum(shrink * jnp.maximum(jnp.abs(low), jnp.abs(high)), SMALLEST_RANGE)
    if spec.bits == 1 or convention == "symu":
        return 2.0 * largest / spec.max_code
    if convention == "symr":
        return largest / (2 ** (spec.bits - 1) - 1)
    return jnp.where(high >= -low, -largest, largest) / 2 ** (spec.bits - 1)


def stored_scale(scale, spec: QuantSpec):
    """The scale as it will be read back, in float32.

    None underflows to zero: the smallest, SMALLEST_RANGE / 255 = 3.9e-8, is nearer to the smallest float16, a subnormal
    of 6.0e-8. On a device that flushes subnormals to zero such a scale becomes the smallest normal number.
    """
    dtype = jnp.dtype(spec.scale_dtype)
    stored = scale.astype(dtype).astype(jnp.float32)
    tiny = float(jnp.finfo(dtype).tiny)
    return jnp.where(stored == 0, jnp.copysign(tiny, scale), stored)


def search_shrink(grouped, real, spec: QuantSpec, options: RangeOptions, importance=None):
    """The factor p of each group's range that leaves the least error, `[groups, 1, N]`; the first of equal ones."""
    convention = options.resolve(spec)
    weights = importance if options.clip == "opt" and importance is not None else 1.0

    def error(shrink):
        scale, zero = group_ranges(grouped, real, shrink, spec, convention)
        codes = round_to_codes(grouped, scale, zero, spec)
        square = jnp.square((codes - zero) * scale - grouped)
        # |error|^2.4 by logarithm and exponential, which a CPU does three times as fast as a power.
        cost = square if options.clip == "opt" else jnp.exp(1.2 * jnp.log(square))
        return jnp.sum(weights * cost, axis=1, keepdims=True, where=real)

    def step(i, best):
        least, chosen = best
        found = error(shrinks[i])
        return jnp.minimum(found, least), jnp.where(found < least, shrinks[i], chosen)

    shrinks = jnp.asarray(_shrinks(spec, options), jnp.float32)
    least = error(1.0)
    return jax.lax.fori_loop(0, len(shrinks), step, (least, jnp.ones_like(least)))[1]


def _shrinks(spec: QuantSpec, options: RangeOptions) -> np.ndarray:
    """The factors that are tried beside 1, in the order of the original."""
    if options.clip == "mse":
        return 1.0 - np.arange(1, 80) / 100
    step, reach = (0.005, 90) if spec.bits == 2 else (0.0075, 100)
    steps = np.arange(-reach, reach + 1)
    return 1.0 / (1.0 - step * steps[steps != 0])
