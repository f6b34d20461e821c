"""From scores to costs: what a unit is taken to lose at every width.

The squared error of rounding falls by about four with every bit, so that a unit of weight r loses about r 4^-b at b
bits. Where a score is no loss, its order is all that can be trusted; where it is, its size says more.

    place    r = n (L - rank) / L    for n weights and L units, the most important of rank 0
    value    r = the score           of the unit as a whole, above 0
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from lq.errors import UserError
from lq.importance.scores import Scores

Costs = Literal["place", "value"]


def check_costs(costs: object) -> None:
    """Raises UserError unless `costs` is one of `Costs`."""
    if costs not in get_args(Costs):
        raise UserError(f"costs: {costs!r}; write {' or '.join(get_args(Costs))}")


def expected_costs(
    scores: Scores, units: Sequence[str], weights: Sequence[int], widths: Sequence[int], costs: Costs
) -> Float[np.ndarray, "units widths"]:
    """The cost of every unit at every width.

    Args:
      scores: of the units, and perhaps of others.
      units: most important first.
      weights: how many each has.
      widths: in bits.
      costs: the rule.

    Raises:
      UserError: `costs` is "value", and a score is no loss.
    """
    if costs == "place":
        loss = np.array(weights) * (len(units) - np.arange(len(units))) / max(len(units), 1)
    else:
        loss = np.array([scores.values[unit] for unit in units])
        if (loss <= 0).any():
            unit = units[int(np.argmin(loss))]
            raise UserError(
                f"costs: value, but {scores.metric} of {unit} is {scores.values[unit]:g}, which is no loss; write place"
            )
    return loss[:, None] * 4.0 ** -np.array(widths, float)
