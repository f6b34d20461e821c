"""ECoFLaP's zeroth-order importance: how steep the loss is in the weights of a unit, by forward passes alone.

    g = mean over probes of |L(theta + eps z) - L(theta - eps z)| / (2 eps),     z ~ N(0, 1) on the unit's weights

with L the mean negative log-likelihood of the calibration text. g is on average sqrt(2/pi) times the length of the
gradient, and so grows with the root of the number of weights; `normalize` divides by that root, which leaves sqrt(2/pi)
times the root mean square of the gradient's elements: for units of different sizes.

z is known from the seed, the matrix and the probe, and never stored. Published is one probe per batch of text and the
sum over them; here every probe sees all windows, so that their order does not matter, and the mean is taken: of n
probes its relative standard error is sqrt((pi/2 - 1) / n), 0.38 for 4.

The loss is float32, known to about one part in 10^7: g is known to about 10^-4 at eps = 0.001. `eps` is of the weights'
own scale, and must stay small before their magnitude.

Source: Sung et al., ECoFLaP, arXiv 2310.02998, and the code beside it: the coarse importance alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Array

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.noise import noise_keys, with_noise
from lq.importance.replay import Replay, States
from lq.importance.similarity import StreamOptions
from lq.importance.units import Unit, units_in, units_of
from lq.importance.weights import weight_at, with_weights
from lq.models.source import ParameterSource, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZerothOrderOptions(StreamOptions):
    unit: Unit = "block"
    eps: float = 1e-3
    probes: int = 4
    normalize: bool = False  # by the root of the number of weights
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.eps < float("inf"):
            raise UserError(f"eps: {self.eps}; write a number above 0, such as 0.001")
        if self.probes < 1:
            raise UserError(f"probes: {self.probes}; write 1 or more")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; write 0 or more")


def zeroth_order(source: ParameterSource, windows: Windows, options: ZerothOrderOptions) -> dict:
    """How steep the loss is in a unit's weights: differences along random directions."""
    run, keys = Replay(source, windows, options.batch_size), noise_keys(source.config, options.seed)
    units, values = units_of(source.config, options.unit), {}
    for index, params, before, _ in run.blocks():
        loss = functools.partial(_loss, run, index, params, before)
        for unit, paths in units_in(units, index).items():
            weights = {path: weight_at(params, path, "zeroth_order") for path in paths}
            of_unit = {path: keys[path] for path in paths}
            slopes = [slope(loss, weights, of_unit, probe, options.eps) for probe in range(options.probes)]
            size = sum(weight.size for weight in weights.values())
            values[unit] = float(np.mean(slopes)) / (math.sqrt(size) if options.normalize else 1.0)
    return {"values": values, "passes": run.passes}


def _loss(run: Replay, index: int, params: Params, before: States, weights: dict[str, Array]) -> float:
    """Of the model with these weights in block `index`."""
    return run.nll(run.to_end(index + 1, run.through(index, with_weights(params, weights), before)))


def slope(
    loss: Callable[[dict[str, Array]], float],
    weights: dict[str, Array],
    keys: dict[str, Array],
    probe: int,
    eps: float,
) -> float:
    """|loss(weights + eps z) - loss(weights - eps z)| / (2 eps), z the probe of this number under the keys."""
    ahead, back = (
        loss({path: with_noise(weight, keys[path], probe, size) for path, weight in weights.items()})
        for size in (eps, -eps)
    )
    return abs(ahead - back) / (2 * eps)
