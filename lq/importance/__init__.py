"""Importance scores: how many bits each part of a model deserves, larger = more. `METRICS` is the registry."""

import dataclasses
from collections.abc import Mapping

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.alpha import AlphaOptions, alpha
from lq.importance.cfsp import CFSPOptions, cfsp
from lq.importance.controls import (
    CountOptions,
    NoOptions,
    RandomOptions,
    RecipeOptions,
    ends_random,
    first_last,
    k_quant,
    parameter_count,
    random,
    reverse,
)
from lq.importance.delta_loss import DeltaLossOptions, delta_loss
from lq.importance.first_order import first_order
from lq.importance.fisher import FisherOptions, fisher
from lq.importance.hessian_trace import HessianTraceOptions, hessian_trace
from lq.importance.jaccard import JaccardOptions, jaccard
from lq.importance.kurtosis import KurtosisOptions, kurtosis
from lq.importance.lim import LIMOptions, lim
from lq.importance.linearity import LinearityOptions, linearity
from lq.importance.logit_lens import logit_lens
from lq.importance.measured import MeasuredOptions, measured_kl
from lq.importance.nsds import NSDSOptions, nsds
from lq.importance.output_mse import OutputMSEOptions, output_mse
from lq.importance.owl import OWLOptions, owl
from lq.importance.path_integral import PathIntegralOptions, path_integral
from lq.importance.predicted import PredictedOptions, predicted_kl
from lq.importance.quantized import QuantizedOptions
from lq.importance.relevance import relevance
from lq.importance.scores import Scores
from lq.importance.shapley import ShapleyOptions, shapley
from lq.importance.similarity import InfluenceOptions, StreamOptions, angular, block_influence, contribution
from lq.importance.skip_effect import SkipOptions, skip_effect
from lq.importance.zd import ZDOptions, zd
from lq.importance.zeroth_order import ZerothOrderOptions, zeroth_order
from lq.models.fingerprint import fingerprint
from lq.models.matrices import model_shapes, other_weights
from lq.models.source import ParameterSource
from lq.registry import Method, Registry

METRICS = Registry(
    "metric",
    {
        "lim": Method(function=lim, options=LIMOptions, needs=frozenset({"calibration"})),
        "zd": Method(function=zd, options=ZDOptions),
        "block_influence": Method(function=block_influence, options=InfluenceOptions, needs=frozenset({"calibration"})),
        "angular": Method(function=angular, options=StreamOptions, needs=frozenset({"calibration"})),
        "contribution": Method(function=contribution, options=StreamOptions, needs=frozenset({"calibration"})),
        "cfsp": Method(function=cfsp, options=CFSPOptions, needs=frozenset({"calibration"})),
        "logit_lens": Method(function=logit_lens, options=StreamOptions, needs=frozenset({"calibration"})),
        "jaccard": Method(function=jaccard, options=JaccardOptions, needs=frozenset({"calibration"})),
        "skip_effect": Method(function=skip_effect, options=SkipOptions, needs=frozenset({"calibration"})),
        "zeroth_order": Method(function=zeroth_order, options=ZerothOrderOptions, needs=frozenset({"calibration"})),
        "owl": Method(function=owl, options=OWLOptions, needs=frozenset({"calibration"})),
        "kl": Method(function=measured_kl, options=MeasuredOptions, needs=frozenset({"calibration"})),
        "shapley": Method(function=shapley, options=ShapleyOptions, needs=frozenset({"calibration"})),
        "output_mse": Method(function=output_mse, options=OutputMSEOptions, needs=frozenset({"calibration"})),
        "linearity": Method(function=linearity, options=LinearityOptions, needs=frozenset({"calibration"})),
        "delta_loss": Method(function=delta_loss, options=DeltaLossOptions, needs=frozenset({"calibration"})),
        "path_integral": Method(function=path_integral, options=PathIntegralOptions, needs=frozenset({"calibration"})),
        "first_order": Method(function=first_order, options=QuantizedOptions, needs=frozenset({"calibration"})),
        "fisher": Method(function=fisher, options=FisherOptions, needs=frozenset({"calibration"})),
        "hessian_trace": Method(function=hessian_trace, options=HessianTraceOptions, needs=frozenset({"calibration"})),
        "relevance": Method(function=relevance, options=InfluenceOptions, needs=frozenset({"calibration"})),
        "predicted_kl": Method(function=predicted_kl, options=PredictedOptions, needs=frozenset({"calibration"})),
        "alpha": Method(function=alpha, options=AlphaOptions),
        "kurtosis": Method(function=kurtosis, options=KurtosisOptions),
        "nsds": Method(function=nsds, options=NSDSOptions),
        "first_last": Method(function=first_last, options=NoOptions),
        "ends_random": Method(function=ends_random, options=RandomOptions),
        "k_quant": Method(function=k_quant, options=RecipeOptions),
        "parameter_count": Method(function=parameter_count, options=CountOptions),
        "random": Method(function=random, options=RandomOptions),
    },
)


def score(
    source: ParameterSource, metric: str, windows: Windows | None = None, options: Mapping[str, object] | None = None
) -> Scores:
    """Scores every block of a model.

    Args:
      source: an open checkpoint, or parameters in memory (`lq.models.InMemory`); read block by block.
      metric: a name in `METRICS`.
      windows: calibration tokens, for metrics that need them.
      options: fields of the metric's options.

    Raises:
      UserError: unknown metric or option, calibration missing, or a score that is not finite.
    """
    method = METRICS[metric]
    if "calibration" in method.needs and windows is None:
        raise UserError(f"metric {metric} needs calibration text; give --calibration FILE, or wikitext2 or c4")
    chosen = METRICS.options(metric, options or {})
    used = windows if "calibration" in method.needs else None
    result = method.function(source, used, chosen)
    return Scores(
        metric=metric,
        values=result["values"],
        model=fingerprint(source),
        shapes=model_shapes(source.config),
        other_weights=other_weights(source.config),
        options=dataclasses.asdict(chosen),
        calibration=used.fingerprint if used else None,
        costs=result.get("costs", {}),
        interactions=result.get("interactions", {}),
        passes=result.get("passes"),
        extra=result.get("extra", {}),
    )


__all__ = ["METRICS", "Scores", "reverse", "score"]
