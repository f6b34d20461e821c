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
from lq.importance.quantized import QuantizedOptions, candidates_of, values_of
from lq.importance.units import units_of
from lq.models.matrices import EMBEDDING, block_of
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredOptions(QuantizedOptions):
    others: Literal["original", "lowest", "highest"] = "original"
    tables: bool = False  # embedding and head are units too


def measured_kl(source: ParameterSource, windows: Windows, options: MeasuredOptions) -> dict:
    """What the model loses with one unit alone at every width: KL divergence, measured."""
    specs, units = options.specs, units_of(source.config, options.unit, tables=options.tables)
    candidates = candidates_of(source, specs, options.recipe, windows, options.batch_size, tables=options.tables)
    judge = Judge(candidates, windows, batch_size=options.batch_size)
    base = {"original": len(specs), "lowest": 0, "highest": len(specs) - 1}[options.others]
    start = {path: base for paths in units.values() for path in paths}
    loss = float(judge.kl(start).mean())
    costs: dict[str, dict[str, float]] = {unit: {} for unit in units}
    for unit, option, found in one_at_a_time(judge, start, units, range(len(specs))):
        costs[unit][str(specs[option])] = found - loss
    return {"values": values_of(costs), "costs": costs, "passes": judge.passes}


def one_at_a_time(
    judge: Judge, base: Mapping[str, int], units: Mapping[str, list[str]], options: Sequence[int]
) -> Iterator[tuple[str, int, float]]:
    """(unit, option, mean KL with the unit at the option and the rest as in `base`), block after block.

    `units` are in the order of the blocks, and each lies in one; embedding and head come last.
    """
    states, at = judge.inputs(base), 0
    for unit, paths in units.items():
        index = block_of(paths[0])
        block = judge.candidates.config.num_blocks if index is None else index
        states, at = judge.states(states, at, base, until=block), block
        for option in options:
            choice = {**base, **dict.fromkeys(paths, option)}
            kl = judge.kl(choice) if paths == [EMBEDDING] else judge.kl_from(states, block, choice)
            yield unit, option, float(np.mean(kl))
