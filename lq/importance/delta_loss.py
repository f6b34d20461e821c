"""What the loss falls by when a unit is given more bits, from the gradient at the quantized model.

    C[unit, option] = sum_ij g_ij (Q(W) - W)_ij,      Q the option,  g the gradient of the loss at a quantized model

in nats per token, up to a constant of the unit: C[low] - C[high] = sum g (W_low - W_high) is the score. The gradient is
taken where quantization arrives, for an expansion at the original does not reach that far. `at` says where:

    low    all matrices at the smallest option     mlx-lm's dynamic_quant, of the KL divergence to the original
    ends   the mean of the gradients at the smallest and at the largest: the trapezoidal rule between the two. Where
           the loss is quadratic the scores then add up to all that lies between low and high.
    each   for every option, all matrices at it    AutoScheme, with loss nll and form absolute

The form `absolute` is sum_ij |g_ij (Q(W) - W)_ij|, of every window alone: signs do not cancel, so that it bounds the
change rather than predicts it. mlx-lm divides by the size of a matrix, which is here the allocator's business.

Source: mlx-lm, mlx_lm/quant/dynamic_quant.py; AutoRound, auto_round/auto_scheme/delta_loss.py (arXiv 2309.05516).
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

from lq.calibration.data import Windows
from lq.importance.backward import Backward
from lq.importance.perturbations import Perturbations, absolute_slopes, slopes
from lq.importance.quantized import QuantizedOptions, scores_from
from lq.importance.units import units_of
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaLossOptions(QuantizedOptions):
    loss: Literal["kl", "nll"] = "kl"  # to the original, or of the text
    at: Literal["low", "ends", "each"] = "low"  # the quantized models where the gradient is taken
    form: Literal["signed", "absolute"] = "signed"


def delta_loss(source: ParameterSource, windows: Windows, options: DeltaLossOptions) -> dict:
    """The gradient at the low-bit model times what more bits restore (mlx-lm, AutoScheme): one backward pass or two."""
    perturbations = Perturbations(source, windows, options)
    backward = Backward(source, windows, loss=options.loss, batch_size=options.batch_size)
    reduce = slopes if options.form == "signed" else absolute_slopes

    def at(option: int, priced: range) -> dict[str, np.ndarray]:
        errors = functools.partial(perturbations.errors, options=priced)
        return backward.gradients(perturbations.model(option), reduce, errors).by_matrix()

    every = range(len(options.specs))
    if options.at == "each":
        found = [at(option, range(option, option + 1)) for option in every]
        losses = {path: np.concatenate([one[path] for one in found]) for path in found[0]}
    else:
        found = [at(option, every) for option in ((0,) if options.at == "low" else (0, every[-1]))]
        losses = {path: np.mean([one[path] for one in found], axis=0) for path in found[0]}
    return scores_from(units_of(source.config, options.unit), options.specs, losses) | {"passes": backward.passes}
