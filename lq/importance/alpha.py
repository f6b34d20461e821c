"""Heavy tails: the power-law exponent of a matrix's spectrum, smaller for what is better trained.

Of the eigenvalues e of W^T W from the i-th on, ascending, n of them, Hill's estimate is

    alpha = 1 + n / sum over k >= i of ln(e_k / e_i)

`middle` begins at the median (AlphaPruning's PL_Alpha_Hill). `peak` begins where the histogram of log e has its peak,
or near it, where the tail fits best: of all beginnings between 0.95 and 1.5 times the peak the one of least
Kolmogorov-Smirnov distance. A small alpha, a heavy tail, is important: the canonical score is -alpha.

alpha depends on the shape of a matrix: of normal weights `middle` gives 2.1 for a square one and 3.5 for 1 : 4. FARMS
takes square windows of one size instead, and pools their eigenvalues (`windows`, so many along each axis).

Source: Lu et al., AlphaPruning, arXiv 2410.10912; Hu et al., FARMS, arXiv 2506.06280; and the codes beside them.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.errors import UserError
from lq.importance.units import Unit, units_of
from lq.importance.weights import weights_of
from lq.models.source import ParameterSource

BINS = 100  # of the histogram of log10 e
NEAR = 0.95, 1.5  # the beginnings that are tried, over the peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaOptions:
    unit: Unit = "block"  # the mean over its matrices
    tail: Literal["middle", "peak"] = "middle"
    windows: int = 0  # along each axis of a matrix; 0: the matrix as it is

    def __post_init__(self):
        if self.windows < 0:
            raise UserError(f"windows: {self.windows}; write 0 for whole matrices, or so many along each axis")


def alpha(source: ParameterSource, windows: None, options: AlphaOptions) -> dict:
    """How heavy the tails of the spectra are: minus the exponent of their power law. Needs no text."""
    del windows
    values = {}
    for unit, weights in weights_of(source, units_of(source.config, options.unit), "alpha"):
        values[unit] = -float(np.mean([matrix_alpha(weight, options) for weight in weights.values()]))
    return {"values": values}


def matrix_alpha(weight: Float[Array, "... K N"], options: AlphaOptions) -> float:
    """alpha of one matrix; of a stack, the mean."""
    if weight.ndim > 2:
        return float(np.mean([matrix_alpha(one, options) for one in weight]))
    found = np.sort(np.concatenate([_eigenvalues(part) for part in _cut(weight, options.windows)]))
    found = found[found > 1e-12 * found[-1]] if found[-1] > 0 else np.ones(2)  # of rank too low: no tail to speak of
    return hill(found, len(found) // 2) if options.tail == "middle" else peak_alpha(found)


def _cut(weight: Float[Array, "K N"], windows: int) -> list[Array]:
    """Square windows, evenly spaced, `windows` along each axis; the matrix itself for 0."""
    if windows == 0:
        return [weight]
    size = max(min(weight.shape) // 2, 1)
    starts = [np.unique(np.linspace(0, length - size, windows).astype(int)) for length in weight.shape]
    return [weight[i : i + size, j : j + size] for i in starts[0] for j in starts[1]]


def _eigenvalues(weight: Float[Array, "K N"]) -> np.ndarray:
    return np.square(np.asarray(_singular(weight.astype(jnp.float32)), np.float64))


_singular = jax.jit(lambda weight: jnp.linalg.svd(weight, compute_uv=False))


def hill(found: Float[np.ndarray, " n"], first: int) -> float:
    """Hill's estimate over the ascending `found` from `first` on; infinite where they are all the same."""
    tail = found[first:]
    logs = np.log(tail / tail[0]).sum()
    return 1.0 + len(tail) / logs if logs > 0 else float(np.finfo(np.float32).max)


def peak_alpha(found: Float[np.ndarray, " n"]) -> float:
    """Hill's estimate from the beginning near the peak of the spectrum whose tail is nearest to a power law."""
    counts, edges = np.histogram(np.log10(found), BINS)
    peak = 10 ** edges[np.argmax(counts) + 1]
    near = (found >= NEAR[0] * peak) & (found <= NEAR[1] * peak)
    tried = [int(i) for i in np.flatnonzero(near[:-1])]  # of the last alone there is no tail
    first = min(tried, key=lambda i: distance(found, i)) if tried else len(found) // 2
    return hill(found, first)


def distance(found: Float[np.ndarray, " n"], first: int) -> float:
    """Kolmogorov-Smirnov distance between the tail from `first` on and its power law."""
    tail = found[first:]
    fitted = 1 - (tail / tail[0]) ** (1 - hill(found, first))
    return float(np.abs(fitted - np.arange(len(tail)) / len(tail)).max())
