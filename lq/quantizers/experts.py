"""Experts that saw too few tokens: a second moment of fewer tokens than channels is singular, and says little."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.statistics import InputStats


def fill_in(stats: InputStats, channels: int) -> tuple[InputStats, np.ndarray]:
    """Statistics of a stack of experts, those of an expert with fewer tokens than channels filled up from all experts.

    What is missing up to one token a channel is taken from the mean over all tokens, whichever expert they went to: an
    expert that saw none gets that mean, one that saw enough is left as it is.

    Args:
      stats: every field `[E, ...]`.
      channels: K, of the input.

    Returns:
      The statistics filled up, and the tokens `[E]` that each expert really saw.
    """
    seen = np.asarray(stats.tokens)
    missing = jnp.maximum(channels - stats.tokens, 0.0)
    share = missing / jnp.maximum(stats.tokens.sum(), 1.0)

    def filled(field):
        return field + share.reshape(-1, *[1] * (field.ndim - 1)) * field.sum(0)

    sums = jax.tree.map(filled, dataclasses.replace(stats, sample=None, peak=None))
    return dataclasses.replace(sums, sample=stats.sample, peak=stats.peak), seen
