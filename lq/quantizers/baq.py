"""BAQ: runs of input channels get widths by what their channels lose, at a given mean width, and GPTQ rounds to them.

Channel k contributes L_k = sum over n of (R_kk (t_kn - q_kn))^2 / 2 to half the output error (`lq.quantizers.sweep`; in
terms of GPTQ's U, (t - q)^2 / (2 U_kk^2)). A first sweep, at the mean width, measures it. With b_k bits it would be
c_k 2^(-a b_k), and at a given mean width the sum of all is least where they are equal.

a is 2 for fine uniform steps, and 1.95 in BAQ. In the best range a bit more divides the error of normal weights by
3.06, 3.17 and 3.24 from 1 bit on, which is a = 1.61, 1.67 and 1.70.

Widths are whole and of runs of 128 channels, sorted by their loss and cut: what `lq.numerics.segmented` stores.

The law holds for channels that are rounded, not for those that are cut off: where the inputs are nearly dependent, what
is made up for in a channel of little energy can leave its range, and few bits lose far more than foreseen. `guard`
measures both and keeps one width for all where the mixture loses more, which BAQ does not.

Source: the code of BAQ (CSU-ModelCompression/BAQ, commit 4f2e027), where every channel has any number of levels, and
codes are not stored.
"""

import dataclasses
import functools
import heapq
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lq.calibration.statistics import HIGHEST, InputStats
from lq.errors import UserError
from lq.numerics.spec import SEGMENT_CHANNELS, QuantSpec
from lq.quantizers.gptq import GPTQFactor, GPTQOptions, factorize, gptq, sweep_matrix
from lq.quantizers.runs import cut, sweep_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class BAQOptions(GPTQOptions):
    """GPTQ's options, and for a mixed spec how widths may differ."""

    method: ClassVar[str] = "baq"

    low: int = 1  # least bits of a run
    high: int = 8  # most bits of a run
    slope: float = 1.6  # a
    guard: bool = True  # one width for all runs where the mixture loses more

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.low <= self.high <= 8:
            self._refuse("low", f"{self.low}, high: {self.high}", "widths from 1 to 8")
        if not 0.0 < self.slope < float("inf"):
            self._refuse("slope", self.slope, "a number above 0, such as 1.6")

    def check(self, spec: QuantSpec) -> None:
        """Raises UserError when an option contradicts the spec or another option."""
        if spec.mixed and self.static_groups is False:
            raise UserError("baq: the ranges of a mixed spec are found before the sweep; write static_groups true")
        if spec.mixed and not self.low <= spec.bits <= self.high:
            raise UserError(f"baq: {spec.bits} bits of runs from {self.low} to {self.high}; write other low and high")
        super().check(spec)

    def dynamic(self, spec: QuantSpec) -> bool:
        """As GPTQ's; no range of a mixed spec is found in the sweep, whose order is not that of the runs."""
        return not spec.mixed and super().dynamic(spec)


def baq(weight: Float[Array, "... K N"], stats: InputStats | GPTQFactor, spec: QuantSpec, options: BAQOptions):
    """GPTQ where, with a mixed spec, runs of input channels get widths of their own by what they lose.

    As `gptq`: this is the function for what is not mixed. `baq_segments` is the one for matrices that are.
    """
    return gptq(weight, stats, spec, options)


def baq_segments(weight: Float[Array, "K N"], stats: InputStats | GPTQFactor, spec: QuantSpec, options: BAQOptions):
    """A matrix of a mixed spec: GPTQ with a width for each run of 128 input channels, of mean `spec.bits`.

    The widths depend on the numbers, so this is not to be jitted. Both of its sweeps are, and compile once for a shape.

    Args:
      weight: one matrix that `spec` mixes, any float dtype, finite.
      stats: statistics with a `hessian`, or what `factorize` made of them.
      spec: a mixed spec.

    Returns:
      What `SegmentedQTensor.from_segments` takes: the permutation int32 `[K]`, row i of the segments being input
      channel `permutation[i]`; and the segments, widest first: width, codes uint32 `[channels, N]`, scales float32 and
      zeros uint32 `[groups, N]` (None when symmetric). Where all runs get the same width nothing is permuted, and the
      one segment is what `gptq` with static groups makes.

    Raises:
      UserError: the options contradict the spec.
      ValueError: no statistics, or a matrix that is not mixed.
    """
    if not spec.mixes(weight.shape):
        raise ValueError(f"{spec} does not mix a matrix {weight.shape}")
    options.check(spec)
    factor = stats if isinstance(stats, GPTQFactor) else factorize(stats, options)
    losses, error = channel_losses(weight, factor, spec, options)
    losses = np.asarray(losses, np.float64)
    permutation = np.argsort(-losses, kind="stable").astype(np.int32)
    by_run = losses[permutation].reshape(-1, SEGMENT_CHANNELS).sum(1)
    widths = allocate_widths(by_run, spec.bits, options.low, options.high, options.slope)
    if (widths == spec.bits).all():
        permutation = np.arange(len(weight), dtype=np.int32)
    codes, scales, zeros, mixed_error = _quantize(weight, factor, permutation, widths, spec, options)
    if options.guard and not mixed_error <= error:
        widths, permutation = np.full_like(widths, spec.bits), np.arange(len(weight), dtype=np.int32)
        codes, scales, zeros, _ = _quantize(weight, factor, permutation, widths, spec, options)
    return jnp.asarray(permutation), cut(codes, scales, zeros, widths, spec)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def channel_losses(
    weight: Float[Array, "K N"], factor: GPTQFactor, spec: QuantSpec, options: GPTQOptions
) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    """What each input channel contributes to half the output error of GPTQ at one width, `spec.bits`; and that error.

    L_k = sum over n of (R^T D)_kn^2 / 2, float32; their sum is tr(D^T (H + damping) D) / 2. The error, tr(D^T H D) / 2,
    is without the damping.
    """
    difference, _, _ = sweep_matrix(weight, factor, spec, options)
    return _losses(difference, factor)


def _losses(difference: Float[Array, "K N"], factor: GPTQFactor) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    """As `channel_losses`, of any D."""
    contributions = jnp.matmul(factor.upper.T, difference[factor.order], precision=HIGHEST)
    losses = jnp.zeros(len(difference)).at[factor.order].set(jnp.sum(contributions**2, axis=1) / 2)
    damping = jnp.where(factor.finite, factor.damping, 0.0)
    return losses, losses.sum() - damping * jnp.sum(difference**2) / 2


def allocate_widths(
    losses: Float[np.ndarray, " R"], bits: int, low: int, high: int, slope: float = 2.0
) -> Int[np.ndarray, " R"]:
    """The whole widths of mean `bits`, within [low, high], of least sum of losses 2^(-slope (width - bits)). int32.

    From `low` on one bit after the other goes where it gains most, the first of equals. Since each bit of a run gains
    less than the one before, no other widths are better. Raises UserError for a mean that is not within the bounds.
    """
    if not low <= bits <= high:
        raise UserError(f"widths from {low} to {high} of mean {bits}; write a mean between them")
    widths = np.full(len(losses), low, np.int32)
    # What a bit gains is the same share of any loss: the largest loss gains most.
    loss = lambda i: float(losses[i]) * 2.0 ** (-slope * (widths[i] - bits))  # noqa: E731
    heap = [(-loss(i), i) for i in range(len(losses)) if low < high]
    heapq.heapify(heap)
    for _ in range((bits - low) * len(losses)):
        _, i = heapq.heappop(heap)
        widths[i] += 1
        if widths[i] < high:
            heapq.heappush(heap, (-loss(i), i))
    return widths


def _quantize(weight, factor: GPTQFactor, permutation, widths: Int[np.ndarray, " R"], spec: QuantSpec, options):
    """Codes `[K, N]`, scales and zeros `[groups, N]`, in the order of the permutation and each run at its width; and
    half the output error."""
    at = (spec.segment(options.high), options, options.low, options.high)
    codes, scales, zeros, difference = sweep_runs(weight, factor, permutation, widths, *at)
    return codes, scales, zeros, float(_error(difference, factor))


@jax.jit
def _error(difference: Float[Array, "K N"], factor: GPTQFactor) -> Float[Array, ""]:
    return _losses(difference, factor)[1]
