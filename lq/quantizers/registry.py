"""The tables of quantizers, and of what scales channels before them."""

from lq.quantizers.rtn import RTNOptions, rtn
from lq.registry import Method, Registry

QUANTIZERS = Registry("quantizer", {"rtn": Method(function=rtn, options=RTNOptions, check=RTNOptions.resolve)})
SCALINGS = Registry("channel scaling", {})
