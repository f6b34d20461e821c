"""OWL's layer outlier distribution: the share of weights that matter far more than the average one.

    A_ij = |W_ij| x_i,     x_i the root mean square of input i         (Wanda's metric)
    D    = share of A_ij > M mean(A)                                   over all matrices of the unit

Larger is more outliers, which is canonical as it stands. Of normal weights and equal inputs D is erfc(M / sqrt(pi)):
0.017 at M = 3, 0.000066 at the authors' M = 5, so that there it counts outliers of the inputs above all.

Source: Yin et al., Outlier Weighed Layerwise Sparsity, arXiv 2310.05175, and the code beside it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.inputs import input_energies
from lq.importance.similarity import StreamOptions
from lq.importance.units import Unit, units_of
from lq.importance.weights import weights_of
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class OWLOptions(StreamOptions):
    unit: Unit = "block"
    threshold: float = 5.0  # M, in means

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold < float("inf"):
            raise UserError(f"threshold: {self.threshold}; write a number of means above 0, such as 5")


def owl(source: ParameterSource, windows: Windows, options: OWLOptions) -> dict:
    """The share of weights whose magnitude times that of their input is far above the average."""
    energies = input_energies(source, windows, options.batch_size)
    values = {}
    for unit, weights in weights_of(source, units_of(source.config, options.unit), "owl"):
        scales = [jnp.sqrt(energies[path]) for path in weights]
        values[unit] = outlier_share(list(weights.values()), scales, options.threshold)
    return {"values": values}


def outlier_share(weights: list[Array], scales: list[Array], threshold: float) -> float:
    """D of matrices `[..., K, N]` whose inputs have root mean squares `[..., K]`."""
    sizes = np.array([w.size for w in weights], np.float64)
    means = np.array([_mean(w, x) for w, x in zip(weights, scales, strict=True)], np.float64)
    limit = threshold * (sizes @ means) / sizes.sum()
    beyond = sum(int(_beyond(w, x, limit)) for w, x in zip(weights, scales, strict=True))
    return beyond / sizes.sum()


@jax.jit
def _mean(weight: Array, scale: Float[Array, "... K"]):
    return (jnp.abs(weight.astype(jnp.float32)) * scale[..., None]).mean()


@jax.jit
def _beyond(weight: Array, scale: Float[Array, "... K"], limit):
    return jnp.sum(jnp.abs(weight.astype(jnp.float32)) * scale[..., None] > limit, dtype=jnp.int32)
