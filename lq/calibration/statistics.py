"""`InputStats`: what calibration remembers of the inputs of one matrix. Reductions over tokens, not the activations.

A quantizer names the fields it needs (`Method.needs`); the others are None. Sums are float32, products in full float32
precision on every device: in TF32 or bfloat16 the second moment is not even positive semi-definite. For a stack of
experts every field has a leading axis, and an expert's sums are over the tokens that were sent to it.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
SAMPLE_ROWS = 512  # rows of X kept in `sample`


@flax.struct.dataclass
class InputStats:
    """Reductions over the tokens x `[K]` that a matrix `[K, N]` was applied to, each counted with its weight."""

    tokens: Float[Array, "..."]  # sum of weights; the number of tokens where none are given
    seen: Float[Array, "..."] | None = None  # the number of tokens of positive weight
    hessian: Float[Array, "... K K"] | None = None  # sum of x x^T
    total: Float[Array, "... K"] | None = None  # sum of x
    absolute: Float[Array, "... K"] | None = None  # sum of |x|
    square: Float[Array, "... K"] | None = None  # sum of x^2: the diagonal of the hessian
    peak: Float[Array, "... K"] | None = None  # largest |x| of the tokens of positive weight, 0 where there is none
    sample: Float[Array, "... S K"] | None = None  # some of the x themselves, evenly spaced

    def __add__(self, other: "InputStats") -> "InputStats":
        """The statistics of both sets of tokens. The sample grows."""
        merge = {"peak": jnp.maximum, "sample": lambda a, b: jnp.concatenate([a, b], axis=-2)}
        merged: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            merged[field.name] = None if a is None else merge.get(field.name, jnp.add)(a, b)
        return InputStats(**merged)

    @property
    def mean(self) -> Float[Array, "... K"]:
        """Mean of x; 0 without tokens. Raises ValueError when `total` was not collected."""
        return self._per_token(self.total, "total")

    @property
    def mean_absolute(self) -> Float[Array, "... K"]:
        """Mean of |x|; 0 without tokens. Raises ValueError when `absolute` was not collected."""
        return self._per_token(self.absolute, "absolute")

    @property
    def mean_square(self) -> Float[Array, "... K"]:
        """Mean of x^2; 0 without tokens. Raises ValueError when `square` was not collected."""
        return self._per_token(self.square, "square")

    def _per_token(self, summed: Array | None, name: str) -> Array:
        if summed is None:
            raise ValueError(f"these statistics have no {name}: name it among what is needed")
        return summed / jnp.where(self.tokens > 0, self.tokens, 1.0)[..., None]


def reduce_inputs(
    x: Float[Array, "T K"], needs: frozenset[str], weights: Float[Array, " T"] | None = None, rows: int = SAMPLE_ROWS
) -> InputStats:
    """The statistics of the rows of `x`, pure and jittable.

    Args:
      x: tokens, any float dtype.
      needs: names of the fields to fill.
      weights: of each token, in every sum, not negative; 1 when None.
      rows: how many rows the sample has at most, evenly spaced.
    """
    x = x.astype(jnp.float32)
    weighted = x if weights is None else x * weights[:, None]
    counted = True if weights is None else weights[:, None] > 0
    return InputStats(
        tokens=jnp.float32(x.shape[0]) if weights is None else weights.sum(),
        seen=jnp.float32(x.shape[0]) if weights is None else jnp.sum(weights > 0, dtype=jnp.float32),
        hessian=jnp.matmul(weighted.T, x, precision=HIGHEST) if "hessian" in needs else None,
        total=weighted.sum(0) if "total" in needs else None,
        absolute=jnp.abs(weighted).sum(0) if "absolute" in needs else None,
        square=(weighted * x).sum(0) if "square" in needs else None,
        peak=jnp.max(jnp.abs(x), axis=0, initial=0.0, where=counted) if "peak" in needs else None,
        sample=x[:: max(-(-x.shape[0] // rows), 1)] if "sample" in needs else None,
    )


def lookup_statistics(channels: int, needs: frozenset[str]) -> InputStats:
    """Those of a lookup, which reads a row of its table as it is: every channel alone, once, with 1.

    There is no sample that is smaller than all of that; for what asks for one there is `square` instead, which of
    inputs that never meet says as much.
    """
    ones = jnp.ones(channels, jnp.float32)
    return InputStats(
        tokens=jnp.float32(channels),
        seen=jnp.float32(channels),
        hessian=jnp.eye(channels, dtype=jnp.float32) if "hessian" in needs else None,
        total=ones if "total" in needs else None,
        absolute=ones if "absolute" in needs else None,
        square=ones if needs & {"square", "sample"} else None,
        peak=ones if "peak" in needs else None,
    )
