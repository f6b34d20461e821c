"""From scores to costs: what a unit is taken to lose at every width.

The squared error of rounding falls by about four with every bit, so that a unit of weight r loses about r 4^-b at b
bits. Where a score is no loss, its order is all that can be trusted; where it is, its size says more.

    measured the loss of the unit at each width, where the score has it
    place    r = n (L - rank) / L    for n weights and L units, the most important of rank 0
    value    r = the score           of the unit as a whole, above 0

Where a pin decides some matrices of a unit, the others lose their share of it by weights: of what each matrix loses
nothing is known.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from lq.errors import UserError
from lq.importance.scores import Scores
from lq.numerics.spec import QuantSpec

Costs = Literal["measured", "place", "value"]


def costs_for(scores: Scores, method: str, costs: Costs | None) -> Costs:
    """`costs` itself; where it is None, what was measured if something was, and the place otherwise.

    Raises UserError unless it is one of `Costs` that the scores allow and the allocator goes by.
    """
    if costs is None:
        return "measured" if scores.costs and method != "rank" else "place"
    if costs not in get_args(Costs):
        raise UserError(f"costs: {costs!r}; write {' or '.join(get_args(Costs))}")
    if method == "rank" and costs != "place":
        raise UserError(f"costs: {costs}, but rank goes by the place alone; write greedy, lagrangian, knapsack or milp")
    if costs == "measured" and not scores.costs:
        raise UserError(f"costs: measured, but {scores.metric} measures none; write place or value, or score by kl")
    return costs


def expected_costs(
    scores: Scores, units: Sequence[str], weights: Sequence[int], options: Sequence[QuantSpec], costs: Costs
) -> Float[np.ndarray, "units options"]:
    """The cost of every unit, as a whole, under every option.

    Args:
      scores: of the units, and perhaps of others.
      units: most important first.
      weights: how many each has.
      options: what a unit's matrices may become.
      costs: the rule.

    Raises:
      UserError: `costs` is "value", and a score is no loss; or "measured", and an option was not.
    """
    if costs == "measured":
        found = [[_measured(scores, unit, str(option)) for option in options] for unit in units]
        return np.array(found, float).reshape(len(units), len(options))
    if costs == "place":
        loss = np.array(weights) * (len(units) - np.arange(len(units))) / max(len(units), 1)
    else:
        loss = np.array([scores.values[unit] for unit in units])
        if (loss <= 0).any():
            unit = units[int(np.argmin(loss))]
            raise UserError(
                f"costs: value, but {scores.metric} of {unit} is {scores.values[unit]:g}, which is no loss; write place"
            )
    return loss[:, None] * 4.0 ** -np.array([option.bits for option in options], float)


def _measured(scores: Scores, unit: str, option: str) -> float:
    of_unit = scores.costs[unit]
    if option not in of_unit:
        raise UserError(
            f"costs: {scores.metric} measured {', '.join(of_unit)}, not {option}; choose among those, or score again"
        )
    return of_unit[option]
