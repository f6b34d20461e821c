"""The table of quantizers."""

from lq.quantizers.gptq import GPTQOptions, factorize, gptq
from lq.quantizers.rtn import RTNOptions, rtn
from lq.registry import Method, Registry

QUANTIZERS = Registry(
    "quantizer",
    {
        "rtn": Method(function=rtn, options=RTNOptions, check=RTNOptions.resolve),
        "gptq": Method(
            function=gptq,
            options=GPTQOptions,
            needs=frozenset({"hessian", "calibration"}),
            prepare=factorize,
            check=GPTQOptions.resolve,
        ),
    },
)
