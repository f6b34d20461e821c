"""Kurtosis of weights: matrices with outliers need finer steps (KurtBoost, of the lm-quant-toolkit).

    k = mean((w - mean)^4) / mean((w - mean)^2)^2

Pearson's: 3 for normal weights, 1.8 for uniform, 6 for Laplace. Larger is more important.

KurtBoost looks for spikes along the depth. Of every type of matrix (all query projections, ...) the differences of
neighbours are standardized by their mean and deviation without the outer twentieths; a jump of more than 3 marks the
matrix behind it. Of the two sides of a spike only the way up counts here, which the authors' code does not separate:
the way down marks the matrix next to it.
"""

import dataclasses
from collections import defaultdict
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.errors import UserError
from lq.importance.units import Unit, units_of
from lq.importance.weights import weights_of
from lq.models.source import ParameterSource

CUT = 0.05  # of the differences, at either end


@dataclasses.dataclass(frozen=True, kw_only=True)
class KurtosisOptions:
    unit: Unit = "matrix"
    # the number itself, or by how many deviations it rises above that of the block before, 0 where it does not
    rule: Literal["value", "spike"] = "value"

    def __post_init__(self):
        if self.rule == "spike" and self.unit != "matrix":
            raise UserError(f"rule: spike, but unit {self.unit}: spikes are of one type of matrix; write unit: matrix")


def kurtosis(source: ParameterSource, windows: None, options: KurtosisOptions) -> dict:
    """Outliers among the weights: their fourth moment, or where along the depth it jumps. Needs no text."""
    del windows
    found = {}
    for unit, weights in weights_of(source, units_of(source.config, options.unit), "kurtosis"):
        found[unit] = pooled_kurtosis(list(weights.values()))
    return {"values": found if options.rule == "value" else spikes_of_types(found)}


def pooled_kurtosis(weights: list[Array]) -> float:
    """Pearson's kurtosis of all weights together; 0 where they are all the same."""
    sizes = np.array([w.size for w in weights], np.float64)
    share = sizes / sizes.sum()
    mean = share @ np.array([w.astype(jnp.float32).mean() for w in weights], np.float64)
    second, fourth = share @ np.array([central_moments(w, mean) for w in weights], np.float64)
    return float(fourth / second**2) if second > 0 else 0.0


@jax.jit
def central_moments(weight: Array, mean) -> Float[Array, " 2"]:
    """Second and fourth moment about `mean`, float32."""
    square = jnp.square(weight.astype(jnp.float32) - mean)
    return jnp.stack([square.mean(), jnp.square(square).mean()])


def spikes_of_types(found: dict[str, float]) -> dict[str, float]:
    """`spikes` along the depth, of the units of every type (all query projections, all blocks) for themselves."""
    by_type = defaultdict(dict)
    for path, value in found.items():
        by_type[path.partition("/")[2]][path] = value
    jumps = {}
    for series in by_type.values():
        jumps |= dict(zip(series, spikes(np.array(list(series.values()))), strict=True))
    return {path: jumps[path] for path in found}


def spikes(series: Float[np.ndarray, " L"]) -> np.ndarray:
    """By how many trimmed deviations each number rises above the one before; 0 for the first, and where it falls."""
    if len(series) < 2:
        return np.zeros(len(series))
    rise = np.diff(series)
    cut = int(CUT * len(rise))
    inner = np.sort(rise)[cut : len(rise) - cut]
    deviation = inner.std() + 1e-12 * np.abs(series).max()
    return np.concatenate([[0.0], np.maximum((rise - inner.mean()) / (deviation or 1.0), 0.0) * (rise > 0)])
