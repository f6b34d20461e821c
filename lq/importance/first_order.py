"""The first-order change of the loss at the original, by the size of it (LLM-MQ).

    C[unit, option] = sum over its matrices of  | sum_ij g_ij dW_ij |,      g the gradient of the mean loss of the text

in nats per token, with dW = Q(W) - W the error that the quantizer really makes. One backward pass prices everything.

Where a model is trained the gradient is small and says little of the loss at a distance: the term may have either
sign, and the size alone is kept. `delta_loss` takes the gradient where quantization arrives instead.

Source: Li et al., LLM-MQ: Mixed-precision Quantization for Efficient LLM Deployment, 2023.
"""

import numpy as np

from lq.calibration.data import Windows
from lq.importance.backward import Backward
from lq.importance.perturbations import Perturbations, slopes
from lq.importance.quantized import QuantizedOptions, scores_from
from lq.importance.units import units_of
from lq.models.source import ParameterSource


def first_order(source: ParameterSource, windows: Windows, options: QuantizedOptions) -> dict:
    """The gradient at the original times the error of quantization, by its size (LLM-MQ): one backward pass."""
    perturbations = Perturbations(source, windows, options)
    backward = Backward(source, windows, batch_size=options.batch_size)
    found = backward.gradients(source, slopes, perturbations.errors).by_matrix()
    losses = {path: np.abs(slope) for path, slope in found.items()}
    return scores_from(units_of(source.config, options.unit), options.specs, losses) | {"passes": backward.passes}
