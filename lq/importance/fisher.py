"""The diagonal Fisher information times the squared error of quantization, matrix by matrix.

    C[unit, option] = 1/2 sum_ij F_ij dW_ij^2,      F_ij = sum_s g_ij(s)^2 / T

with g(s) the gradient of -ln p of window s, summed over its scored tokens, T the scored tokens of all windows, and
dW = Q(W) - W the error that the quantizer really makes. C is in nats per token: the second-order term of the loss with
its Hessian taken to be diagonal and the Fisher information.

Gradients are of one window each. Those of a batch, squared, are something else: they shrink as it grows.

`labels` are the text's (the *empirical* Fisher) or drawn from the model's own prediction, one per position (an unbiased
estimate of the true one, which is the Hessian of the KL divergence to the original).

Source: LeCun et al., Optimal Brain Damage, 1989, for the diagonal; Kim et al., SqueezeLLM, arXiv 2306.07629, for the
Fisher information of language models in its place; Kunstner et al., arXiv 1905.12558, for the labels.
"""

import dataclasses
from typing import Literal

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.backward import Backward
from lq.importance.perturbations import Perturbations, squared_slopes
from lq.importance.quantized import QuantizedOptions, scores_from
from lq.importance.units import units_of
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class FisherOptions(QuantizedOptions):
    labels: Literal["data", "model"] = "data"
    seed: int = 0  # of labels drawn from the model

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed: {self.seed}; write a whole number from 0 to {(1 << 32) - 1}")


def fisher(source: ParameterSource, windows: Windows, options: FisherOptions) -> dict:
    """Squared gradients times the squared error of quantization: the diagonal Fisher information, one backward pass."""
    perturbations = Perturbations(source, windows, options)
    loss = "nll" if options.labels == "data" else "sampled"
    backward = Backward(source, windows, loss=loss, seed=options.seed, batch_size=options.batch_size)
    found = backward.gradients(source, squared_slopes, perturbations.errors).by_matrix()
    losses = {path: 0.5 * squares for path, squares in found.items()}
    return scores_from(units_of(source.config, options.unit), options.specs, losses) | {"passes": backward.passes}
