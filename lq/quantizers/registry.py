"""The tables of quantizers, and of what scales a block's channels before any of them."""

from lq.quantizers.adaquant import AdaQuantOptions, adaquant, adaquant_block
from lq.quantizers.autoround import AutoRoundOptions, autoround, autoround_block
from lq.quantizers.awq import AWQOptions, ScalingOptions, awq
from lq.quantizers.awq_scaling import scale_block
from lq.quantizers.baq import BAQOptions, baq, baq_segments
from lq.quantizers.flexround import FlexRoundOptions, flexround, flexround_block
from lq.quantizers.gptq import GPTQOptions, factorize, gptq
from lq.quantizers.hqq import HQQOptions, hqq
from lq.quantizers.rsq import RSQOptions, rsq, token_importance
from lq.quantizers.rtn import RTNOptions, rtn
from lq.quantizers.runs import gptq_widths, rtn_widths
from lq.quantizers.smoothquant import SmoothQuantOptions, smooth_block
from lq.registry import Method, Registry

QUANTIZERS = Registry(
    "quantizer",
    {
        "rtn": Method(
            function=rtn,
            options=RTNOptions,
            needs_more=lambda options: options.needs,
            widths=rtn_widths,
            check=RTNOptions.check,
            fractional=RTNOptions.fractional,
        ),
        "hqq": Method(function=hqq, options=HQQOptions, check=HQQOptions.check, fractional=lambda options, spec: True),
        "gptq": Method(
            function=gptq,
            options=GPTQOptions,
            needs=frozenset({"hessian", "calibration"}),
            prepare=factorize,
            widths=gptq_widths,
            check=GPTQOptions.check,
            fractional=GPTQOptions.fractional,
        ),
        "baq": Method(
            function=baq,
            options=BAQOptions,
            needs=frozenset({"hessian", "calibration"}),
            prepare=factorize,
            segments=baq_segments,
            check=BAQOptions.check,
            fractional=BAQOptions.fractional,
        ),
        "rsq": Method(
            function=rsq,
            options=RSQOptions,
            needs=frozenset({"hessian", "calibration"}),
            prepare=factorize,
            token_weights=token_importance,
            widths=gptq_widths,
            check=RSQOptions.check,
            fractional=RSQOptions.fractional,
        ),
        "awq": Method(
            function=awq,
            options=AWQOptions,
            needs=frozenset({"calibration", "sample"}),
            per_matrix=AWQOptions.for_matrix,
            check=AWQOptions.rounding,
        ),
        "autoround": Method(
            function=autoround,
            options=AutoRoundOptions,
            needs=frozenset({"hessian", "calibration"}),
            block=autoround_block,
        ),
        "flexround": Method(
            function=flexround,
            options=FlexRoundOptions,
            needs=frozenset({"hessian", "calibration"}),
            block=flexround_block,
        ),
        "adaquant": Method(
            function=adaquant,
            options=AdaQuantOptions,
            needs=frozenset({"hessian", "calibration"}),
            block=adaquant_block,
            fractional=lambda options, spec: spec.zero_dtype is not None,
        ),
    },
)
# Functions (config, kind, block_params, hidden, tokens, specs, options, name) -> (block_params, report).
SCALINGS = Registry(
    "channel scaling",
    {
        "awq": Method(
            function=scale_block,
            options=ScalingOptions,
            needs=frozenset({"calibration"}),
            check=ScalingOptions.rounding,
        ),
        "smoothquant": Method(function=smooth_block, options=SmoothQuantOptions, needs=frozenset({"calibration"})),
    },
)
