"""SensiBoost's sensitivity: how far the output of a module is off when its weights are quantized.

    C[unit, option] = mean of (f(x; Q(W)) - f(x; W))^2     over calibration tokens and output channels

with everything before the module as it is. The module is, of a unit that is

    a matrix         the matrix: f is x W
    a group, a part  the attention or the feed-forward network that it is in, the other matrices as they are
    a block          the block: f is the residual stream behind it

Published are the four groups of Llama. The score is the error under the smallest option, or (`rule: spike`) by how many
deviations it rises above that of the same unit in the block before, as in KurtBoost (`lq.importance.kurtosis`).

Errors of different modules are in different units, and those of deep blocks larger because the stream is. `normalize`
divides by the mean of |f| (`absolute`, found in a re-implementation: still not free of units) or of f^2 (`energy`,
ours: the relative error of the output).

Source: Zhang et al., Towards Superior Quantization Accuracy: A Layer-sensitive Approach, arXiv 2503.06518, and the
code beside it, lm-quant-toolkit.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lq.calibration.calls import calls_in_block
from lq.calibration.data import Windows
from lq.calibration.stream import batches, embed_batches, through_block
from lq.importance.kurtosis import spikes_of_types
from lq.importance.quantized import QuantizedOptions, quantized_matrices
from lq.importance.units import Unit, units_in, units_of
from lq.importance.weights import with_weights
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.source import ParameterSource, Params
from lq.numerics.sharded import to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputMSEOptions(QuantizedOptions):
    normalize: Literal["none", "absolute", "energy"] = "none"
    rule: Literal["value", "spike"] = "value"


def output_mse(source: ParameterSource, windows: Windows, options: OutputMSEOptions) -> dict:
    """How far a module's output is off with quantized weights: the mean square, on calibration inputs.

    `passes` counts a run of a block as one whatever the module: what lies behind it is not computed.
    """
    config, units = source.config, units_of(source.config, options.unit)
    quantized = quantized_matrices(source, options, windows, "output_mse")
    rows = batches(windows.tokens, options.batch_size)
    hidden = embed_batches(source, windows.tokens, options.batch_size)
    costs: dict[str, dict[str, float]] = {}
    runs = 0
    for index, kind in enumerate(config.kinds):
        params = source.block(index, jnp.float32)
        of_specs = next(quantized)
        for unit, paths in units_in(units, index).items():
            changed = [with_weights(params, {path: every[path] for path in paths}) for every in of_specs]
            module = module_of(unit, options.unit)
            errors = output_errors(config, kind, module, params, changed, rows, hidden, options.normalize)
            costs[unit] = dict(zip(map(str, options.specs), errors, strict=True))
            runs += 1 + len(changed)
        hidden, runs = through_block(config, kind, params, rows, hidden), runs + 1
    smallest = str(options.specs[0])
    values = {unit: of_unit[smallest] for unit, of_unit in costs.items()}
    values = values if options.rule == "value" else spikes_of_types(values)
    return {"values": values, "costs": costs, "passes": runs / config.num_blocks}


def module_of(unit: str, granularity: Unit) -> str:
    """The path within its block of the module whose output a unit is judged by; the block itself is the empty path."""
    _, *within = unit.split("/")
    return "/".join(within if granularity == "matrix" else within[:1])


def output_errors(
    config: ModelConfig,
    kind: BlockKind,
    module: str,
    params: Params,
    changed: list[Params],
    rows: list[np.ndarray],
    hidden: list[np.ndarray],
    normalize: Literal["none", "absolute", "energy"] = "none",
) -> list[float]:
    """The mean squared error of a module's output under each of `changed`, over the mean |f| or f^2 where asked for."""
    lost, norms, count = np.zeros(len(changed)), {"none": 0.0, "absolute": 0.0, "energy": 0.0}, 0
    for tokens, h in zip(rows, hidden, strict=True):
        output = module_output(config, kind, module, params, h, tokens)
        norms["absolute"] += _summed(jnp.abs(output).sum(-1))
        norms["energy"] += _summed(squared_distance(output, 0.0))
        count += output.size
        for i, other in enumerate(changed):
            lost[i] += _summed(squared_distance(module_output(config, kind, module, other, h, tokens), output))
    norm = norms[normalize] if normalize != "none" else count
    return [float(one / norm) if one > 0 else 0.0 for one in lost]


@functools.partial(jax.jit, static_argnames=("config", "kind", "module"))
def module_output(
    config: ModelConfig,
    kind: BlockKind,
    module: str,
    params: Params,
    h: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
) -> Float[Array, "... N"]:
    """What a module of a block gives, from the block's input; of experts, a row for each token sent to one."""
    result = calls_in_block(config, kind, params, h, context_for(tokens), {module: "__call__"})[module].result
    return result[0] if isinstance(result, tuple) else result


@jax.jit
def squared_distance(a: Float[Array, "... N"], b: Float[Array, "... N"] | float) -> Float[Array, "..."]:
    """Summed over the channels; float32."""
    return jnp.square(a - b).sum(-1)


def _summed(of_tokens: Array) -> float:
    return float(to_host(of_tokens).astype(np.float64).sum())
