"""Quantizers: how to choose codes for a given width. `QUANTIZERS` is the registry.

A quantizer is a pure function `(weight [..., K, N], stats, spec, options) -> (codes, scales, zeros)`, jitted with
`spec` and `options` static. What statistics of the layer's input it needs, it declares.
`SCALINGS` are what may rescale the channels of a block before any of them.
"""

from lq.quantizers.apply import quantize_matrix, quantize_part
from lq.quantizers.planned import PlannedSource
from lq.quantizers.registry import QUANTIZERS, SCALINGS

__all__ = ["QUANTIZERS", "SCALINGS", "PlannedSource", "quantize_matrix", "quantize_part"]
