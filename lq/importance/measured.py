"""Measured damage: one unit after the other at every width, the rest as it is, and what the model's output loses.

    C[unit, option] = mean KL(original || model with the unit at the option) - the same without

in nats per token, on the calibration text. `others` says what the rest is: the original, or quantized at the lowest or
the highest of the widths; breaking one unit of a clean model and mending one of a broken model are different questions.
The matrices are those that the quantizer really makes, every option from a model that it quantized uniformly.

A unit changes nothing before its block, so that a measurement costs what lies behind: about half a forward pass.

What KL adds over perplexity: it is never negative, needs no labels, and its variance over texts is far smaller.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from lq.calibration.data import Windows
from lq.evaluation.candidates import Judge
from lq.importance.quantized import QuantizedOptions, candidates_of
from lq.importance.units import units_of
from lq.models.matrices import matrices
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredOptions(QuantizedOptions):
    others: Literal["original", "lowest", "highest"] = "original"


def measured_kl(source: ParameterSource, windows: Windows, options: MeasuredOptions) -> dict:
    """What the model loses with one unit alone at every width: KL divergence, measured."""
    specs, units = options.specs, units_of(source.config, options.unit)
    candidates = candidates_of(source, specs, options.recipe, windows, options.batch_size)
    judge = Judge(candidates, windows, batch_size=options.batch_size)
    base = {"original": len(specs), "lowest": 0, "highest": len(specs) - 1}[options.others]
    start = dict.fromkeys(matrices(source.config), base)
    loss = float(judge.kl(start).mean())
    costs: dict[str, dict[str, float]] = {unit: {} for unit in units}
    for unit, option, found in one_at_a_time(judge, start, units, range(len(specs))):
        costs[unit][str(specs[option])] = found - loss
    values = {unit: of_unit[str(specs[0])] - of_unit[str(specs[-1])] for unit, of_unit in costs.items()}
    return {"values": values, "costs": costs, "passes": judge.passes}


def one_at_a_time(
    judge: Judge, base: Mapping[str, int], units: Mapping[str, list[str]], options: Sequence[int]
) -> Iterator[tuple[str, int, float]]:
    """(unit, option, mean KL with the unit at the option and the rest as in `base`), block after block.

    `units` are in the order of the blocks, and each lies in one.
    """
    states, at = judge.inputs, 0
    for unit, paths in units.items():
        block = int(paths[0].split("/")[0].removeprefix("block_"))
        states, at = judge.states(states, at, base, until=block), block
        for option in options:
            yield unit, option, float(np.mean(judge.kl_from(states, block, {**base, **dict.fromkeys(paths, option)})))
