"""The table of quantizers."""

from lq.quantizers.hqq import HQQOptions, hqq
from lq.quantizers.rtn import RTNOptions, rtn
from lq.registry import Method, Registry

QUANTIZERS = Registry(
    "quantizer",
    {
        "rtn": Method(function=rtn, options=RTNOptions, check=RTNOptions.resolve),
        "hqq": Method(function=hqq, options=HQQOptions, check=HQQOptions.check),
    },
)
