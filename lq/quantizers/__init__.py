"""Quantizers: how to choose codes for a given width. `QUANTIZERS` is the registry.

A quantizer is a pure function `(weight [..., K, N], stats, spec, options) -> (codes, scales, zeros)`, jitted with
`spec` and `options` static. What statistics of the layer's input it needs, it declares; `QuantizedStream` collects them
block by block. `SCALINGS` are what may rescale the channels of a block before. A `Recipe` is a quantizer and what is
done around it.
"""

from collections.abc import Callable, Mapping, MutableMapping

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.models.source import ParameterSource
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_matrix, quantize_part
from lq.quantizers.placement import Place, over_columns, over_local_devices
from lq.quantizers.planned import PlannedSource
from lq.quantizers.recipe import Recipe
from lq.quantizers.registry import QUANTIZERS, SCALINGS
from lq.quantizers.stream import QuantizedStream


def quantized_source(
    source: ParameterSource,
    specs: Mapping[str, QuantSpec],
    recipe: Recipe,
    windows: Windows | None = None,
    *,
    batch_size: int = 8,
    cache: MutableMapping | None = None,
    place: Place | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> ParameterSource:
    """The parts of `source` quantized as they are read: any at any time, or in order where text is needed.

    Args:
      source: the original, dense.
      specs: matrix path -> spec.
      recipe: method, options and what goes with it.
      windows: calibration tokens; needed by recipes that are `calibrated`, and only by them.
      batch_size: windows per device step.
      cache: see `PlannedSource` and `QuantizedStream`.
      place, note: see `QuantizedStream`.

    Raises UserError for a recipe that cannot be carried out on this model, or that lacks its calibration text.
    """
    if not recipe.calibrated:
        return PlannedSource(source, specs, recipe, cache, place=place)
    if windows is None:
        raise UserError(f"{recipe.name} needs calibration text; give --calibration FILE, or wikitext2 or c4")
    return QuantizedStream(source, specs, recipe, windows, batch_size=batch_size, cache=cache, place=place, note=note)


def described(source: ParameterSource, part: str) -> str:
    """A part's name and, where it was measured, what its matrices lose: on average over them, as a share.

    "output error" is the share of the outputs' energy (`lq.quantizers.errors`) over 512 output channels at most, "of
    rounding's error" that of the error which learning began with.
    """
    report = source.report if isinstance(source, QuantizedStream) else {}
    found = [measured for path, measured in report.items() if path.split("/")[0] == part]
    names = dict.fromkeys(name for measured in found for name in measured)
    means = {name: [m[name] for m in found if name in m] for name in names}
    return ", ".join([part, *(f"{sum(values) / len(values):.2%} {name}" for name, values in means.items())])


__all__ = [
    "QUANTIZERS",
    "SCALINGS",
    "Place",
    "PlannedSource",
    "QuantizedStream",
    "Recipe",
    "described",
    "over_columns",
    "over_local_devices",
    "quantize_matrix",
    "quantize_part",
    "quantized_source",
]
