"""Every matrix's share in what quantization really costs: the gradient integrated along the way there.

    L(W + dW) - L(W) = sum over matrices of  int_0^1 sum_ij g_ij(W + t dW) dW_ij dt

with all matrices moving together from the original to the model quantized uniformly at an option, dW = Q(W) - W. The
integral is the midpoint rule's, of `steps` gradients at t = (j + 1/2) / steps. The shares add up to the whole change
but for the rule's error (completeness), whatever the distance; what was measured at the end and what the shares add up
to are in `extra`. A share may be negative: of a matrix whose error makes up for the others'.

C[unit, option] is the unit's share, in nats per token, of a model that is at this option throughout.

Source: Hu et al., PQI, Identifying Sensitive Weights via Post-quantization Integral, arXiv 2503.01901; for the
integral, Sundararajan et al., Axiomatic Attribution for Deep Networks, arXiv 1703.01365. PQI sums absolute values of
single weights; here they are signed, which is what completeness is of.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.backward import Backward
from lq.importance.perturbations import Perturbations, slopes
from lq.importance.quantized import QuantizedOptions, scores_from
from lq.importance.units import units_of
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathIntegralOptions(QuantizedOptions):
    loss: Literal["kl", "nll"] = "kl"  # to the original, or of the text
    steps: int = 4  # gradients on the way to each option

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps: {self.steps}; write 1 or more")


def path_integral(source: ParameterSource, windows: Windows, options: PathIntegralOptions) -> dict:
    """Every matrix's share in the loss of the quantized model: gradients along the way to it (PQI)."""
    perturbations = Perturbations(source, windows, options)
    backward = Backward(source, windows, loss=options.loss, batch_size=options.batch_size)
    before = 0.0 if options.loss == "kl" else backward.loss(source)
    shares, measured, attributed = [], {}, {}
    for option, spec in enumerate(options.specs):
        errors = functools.partial(perturbations.errors, options=(option,))
        points = [perturbations.model(option, (j + 0.5) / options.steps) for j in range(options.steps)]
        found = [backward.gradients(point, slopes, errors).by_matrix() for point in points]
        shares.append({path: np.mean([one[path] for one in found], axis=0) for path in found[0]})
        measured[str(spec)] = backward.loss(perturbations.model(option)) - before
        attributed[str(spec)] = float(np.sum(list(shares[-1].values())))
    losses = {path: np.concatenate([share[path] for share in shares]) for path in shares[0]}
    return scores_from(units_of(source.config, options.unit), options.specs, losses) | {
        "passes": backward.passes,
        "extra": {"measured": measured, "attributed": attributed},
    }
