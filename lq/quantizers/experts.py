"""Experts that saw too few tokens: a second moment of fewer tokens than channels is singular, and says little.

What such an expert lacks is taken from all experts together, whichever a token went to: one that saw nothing gets the
average of all tokens, one that saw enough is left as it is.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lq.calibration.statistics import SAMPLE_ROWS, InputStats
from lq.numerics.sharded import to_host


@dataclasses.dataclass(frozen=True)
class Shortage:
    """How many tokens the experts of a stack saw, and how many are enough."""

    seen: Float[np.ndarray, " E"]
    enough: int

    @classmethod
    def of(cls, stats: InputStats, channels: int, *, moment: bool) -> "Shortage":
        """Of an input of `channels`: one token a channel is enough; without second `moment` as many as a sample has."""
        return cls(to_host(stats.seen).astype(np.float64), channels if moment else min(channels, SAMPLE_ROWS))

    @property
    def starved(self) -> Bool[np.ndarray, " E"]:
        return self.seen < self.enough

    def filled(self, field):
        """Sums `[E, ...]` over the tokens of each expert, NumPy's or JAX's, with as many average tokens as it lacks."""
        share = np.maximum(self.enough - self.seen, 0.0) / max(self.seen.sum(), 1.0)
        return field + share.reshape(-1, *[1] * (field.ndim - 1)).astype(field.dtype) * field.sum(0)

    def tell(self, where: str, instead: str, note: Callable[[str], None]) -> None:
        """A line for the user on the input of the matrix `where`, if anyone is starved; `instead`: what is done."""
        if few := int(self.starved.sum()):
            note(
                f"{where}: {few} of {len(self.seen)} experts saw fewer than {self.enough} tokens (least "
                f"{self.seen.min():.0f}); {instead}. More calibration text helps"
            )


def fill_in(stats: InputStats, shortage: Shortage) -> InputStats:
    """Statistics of a stack of experts `[E, ...]`, those of starved ones filled up from all; `seen` stays the truth.

    Sums grow by as many average tokens as are missing, a peak becomes that of all experts, and empty rows of a sample
    are taken evenly from the rows of all samples.
    """
    apart = dataclasses.replace(stats, seen=None, sample=None, peak=None)
    sums = jax.tree.map(shortage.filled, apart)
    peak, sample = stats.peak, stats.sample
    if peak is not None:
        peak = jnp.where(shortage.starved[:, None], peak.max(0), peak)
    if sample is not None and shortage.starved.any():
        sample = _filled_sample(sample, shortage)
    return dataclasses.replace(sums, seen=stats.seen, peak=peak, sample=sample)


def _filled_sample(sample: Float[Array, "E S K"], shortage: Shortage) -> Float[Array, "E S K"]:
    E, S, K = sample.shape
    used = to_host(jnp.any(sample != 0, axis=-1))  # a sample of fewer rows than it has room for ends in zeros
    pool, row = np.flatnonzero(used), np.arange(E * S).reshape(E, S)
    for expert in np.flatnonzero(shortage.starved):
        free = np.flatnonzero(~used[expert])[: max(min(shortage.enough, S) - int(used[expert].sum()), 0)]
        if len(pool):
            row[expert, free] = pool[np.arange(len(free)) * len(pool) // max(len(free), 1)]
    return sample.reshape(E * S, K)[row]
