"""HIGGS's linearity coefficients: how much a matrix's relative error costs, measured by noise.

For errors that are small and of no direction the linearity theorem has

    loss(quantized) ~ loss + sum over matrices k of a_k t_k^2,     t_k^2 = |Q(W_k) - W_k|^2 / |W_k|^2

a_k is found by adding normal noise of a few relative sizes t to matrix k alone and drawing a line through 0: the least
squares slope of the KL divergence to the original on t^2. The loss of every option is then known from weights alone:

    C[k, option] = a_k t_k^2,     t_k of the real quantizer

for any quantizer with the same a_k, in nats per token. A unit's cost is the sum over its matrices, as the theorem has
it. The score is the cost under the smallest option.

It holds from about three bits on, and for errors without direction: those of rounding after a rotation, but not those
that GPTQ shifts to where the inputs are small. Measuring takes as many half passes as there are matrices and noises,
whatever the options and the units.

Source: Malinovskii et al., Pushing the Limits of Large Language Model Quantization via the Linearity Theorem, arXiv
2411.17525. The sizes of the noise are ours.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.noise import noise_keys, with_noise
from lq.importance.quantized import QuantizedOptions, quantized_matrices
from lq.importance.replay import Replay
from lq.importance.units import units_of
from lq.importance.weights import weight_at
from lq.models.matrices import block_of
from lq.models.source import ParameterSource
from lq.quantizers.apply import with_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearityOptions(QuantizedOptions):
    levels: list[float] = dataclasses.field(default_factory=lambda: [0.05, 0.1, 0.15])  # t, of the noise
    seed: int = 0  # of the noise

    def __post_init__(self):
        super().__post_init__()
        numbers = all(isinstance(t, int | float) and not isinstance(t, bool) for t in self.levels)
        if not self.levels or not numbers or not all(0 < t < math.inf for t in self.levels):
            raise UserError(f"levels: {self.levels}; write relative sizes of noise above 0, such as [0.05, 0.1]")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; write 0 or more")


def linearity(source: ParameterSource, windows: Windows, options: LinearityOptions) -> dict:
    """What quantizing a unit costs by the linearity theorem: its relative error times a slope found with noise.

    Returns under `extra` the coefficient of every matrix, and the squared relative error of its options.
    """
    specs, units = [str(spec) for spec in options.specs], units_of(source.config, options.unit)
    run, keys = Replay(source, windows, options.batch_size), noise_keys(source.config, options.seed)
    quantized = quantized_matrices(source, options, windows, "linearity")
    slopes: dict[str, float] = {}
    errors: dict[str, dict[str, float]] = {}
    for index, params, before, _ in run.blocks():
        of_specs = next(quantized)
        for path in (path for path in keys if block_of(path) == index):
            weight = weight_at(params, path, "linearity")
            sizes = [t * math.sqrt(energy(weight) / weight.size) for t in options.levels]
            noisy = (with_noise(weight, keys[path], draw, size) for draw, size in enumerate(sizes))
            changed = (run.through(index, with_matrix(params, path, other), before) for other in noisy)
            losses = [run.kl(run.to_end(index + 1, states)) for states in changed]
            slopes[path] = slope(np.square(options.levels), np.array(losses))
            found = [relative_error(weight, one[path]) for one in of_specs]
            errors[path] = dict(zip(specs, found, strict=True))
    costs = {
        unit: {spec: sum(slopes[path] * errors[path][spec] for path in paths) for spec in specs}
        for unit, paths in units.items()
    }
    values = {unit: of_unit[specs[0]] for unit, of_unit in costs.items()}
    extra = {"coefficient": slopes, "relative_error": errors}
    return {"values": values, "costs": costs, "passes": run.passes, "extra": extra}


def slope(squares: Float[np.ndarray, " levels"], losses: Float[np.ndarray, " levels"]) -> float:
    """Of the line through 0 nearest to the losses over t^2, by least squares."""
    return float(squares @ losses / (squares @ squares))


def relative_error(weight: Array, quantized: Array) -> float:
    """|quantized - weight|^2 / |weight|^2; 0 where nothing is lost."""
    lost = energy(quantized - weight)
    return lost / energy(weight) if lost > 0 else 0.0


def energy(weight: Array) -> float:
    """The sum of squares: of each column in float32, over the columns in float64."""
    return float(np.asarray(_column_energy(weight), np.float64).sum())


_column_energy = jax.jit(lambda weight: jnp.square(weight.astype(jnp.float32)).sum(-2))
