"""ZD, the z-score distribution: how many weights of a block are far above average (Dumitru et al., arXiv 2406.17415).

    ZD_l = |{ w in block l : z(w) > 1 }| / N_l,      z(w) = (w - mean_l) / std_l

over all linear weights of the block; norms and biases do not count. In the paper a SMALLER ZD is more important (few
outliers carry the block), so the canonical score is -ZD. Known values: 0.15866 for Gaussian weights (one-sided),
0.12156 for Laplace, 0.21132 for uniform: heavier tails give a smaller ZD.

What the paper leaves open is an option: `sides` (z > 1 as worded, or |z| > 1 as other implementations), and `pooling`
(one mean and deviation over the block, or one per matrix and the unweighted mean of the fractions). No calibration
data.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lq.errors import UserError
from lq.models.matrices import block_matrices
from lq.models.source import ParameterSource
from lq.numerics.segmented import is_packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZDOptions:
    sides: Literal["one", "two"] = "one"
    pooling: Literal["block", "matrix"] = "block"
    threshold: float = 1.0  # standard deviations

    def __post_init__(self):
        if not math.isfinite(self.threshold):
            raise UserError(f"threshold: {self.threshold} standard deviations; write a finite number such as 1.0")


@jax.jit
def moments(weight: Array):
    """Mean, and mean squared distance from it, in float32; the second pass avoids cancellation."""
    weight = weight.astype(jnp.float32)
    mean = weight.mean()
    return mean, jnp.square(weight - mean).mean()


@functools.partial(jax.jit, static_argnames="two_sided")
def count_beyond(weight: Array, mean, deviation, threshold, two_sided: bool):
    """How many weights lie more than `threshold` deviations above the mean, or from it."""
    distance = weight.astype(jnp.float32) - mean
    return jnp.sum((jnp.abs(distance) if two_sided else distance) > threshold * deviation, dtype=jnp.int32)


def fraction_beyond(weights: list[Array], options: ZDOptions) -> float:
    """ZD of one pool of weights; NaN where their deviation is not finite.

    The pool is never concatenated: its moments are merged from its matrices'.
    """
    sizes = np.asarray([w.size for w in weights], np.float64)
    means, variances = (np.asarray(v, np.float64) for v in zip(*(moments(w) for w in weights), strict=True))
    if not np.isfinite(means + variances).all():
        return float("nan")
    share = sizes / sizes.sum()
    mean = (share * means).sum()
    deviation = np.sqrt((share * (variances + (means - mean) ** 2)).sum())
    two_sided = options.sides == "two"
    beyond = sum(int(count_beyond(w, mean, deviation, options.threshold, two_sided)) for w in weights)
    return beyond / sizes.sum()


def zd(source: ParameterSource, windows: None, options: ZDOptions) -> dict:
    """How few weights lie far above average: minus their share. Needs no text.

    Raises UserError for a packed block, and, naming the matrix, for weights whose deviation is not finite.
    """
    del windows
    values = {}
    for index, kind in enumerate(source.config.kinds):
        params = source.block(index)
        weights = {path: _leaf(params, path)["kernel"] for path in block_matrices(source.config, kind)}
        if any(is_packed(weight) for weight in weights.values()):
            raise UserError(f"metric zd: block_{index} is packed; score the original model")
        pools = [list(weights.values())] if options.pooling == "block" else [[w] for w in weights.values()]
        share = float(np.mean([fraction_beyond(pool, options) for pool in pools]))
        if np.isnan(share):
            path = next(path for path, weight in weights.items() if not np.isfinite(moments(weight)).all())
            raise UserError(
                f"metric zd: block_{index}/{path}: its weights have no finite deviation; the model is damaged, give an "
                f"intact one"
            )
        values[f"block_{index}"] = -share
    return {"values": values}


def _leaf(tree, path: str):
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)
