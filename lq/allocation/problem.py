"""`Problem`: units, options, what each option costs and how large it is, and a budget. What every solver takes.

    minimize  sum over k of cost[k, choice_k]    such that    sum over k of size[k, choice_k] <= budget

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11). Costs are
predicted losses, of any unit; only their ratios matter.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from lq.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For a solver without choices."""


DEFAULT = NoOptions()
Choice = Int[np.ndarray, " units"]  # the option of every unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Raises UserError for a budget that no choice meets, and ValueError for arrays that do not fit each other."""

    cost: Float[np.ndarray, "units options"]  # finite, or infinite where a unit does not have the option
    size: Int[np.ndarray, "units options"]  # bits with metadata
    budget: int  # bits

    def __post_init__(self):
        if self.cost.shape != self.size.shape or self.cost.ndim != 2 or self.size.dtype.kind not in "iu":
            raise ValueError(f"cost {self.cost.shape} and size {self.size.shape} of {self.size.dtype}")
        if np.isnan(self.cost).any() or not self.offered.any(1).all():
            raise ValueError("a cost that is NaN, or a unit without options")
        if (least := int(self.sizes_of(self.smallest()).sum())) > self.budget:
            raise UserError(f"budget: {self.budget} bits cannot be met; the least is {least}")

    @property
    def offered(self) -> np.ndarray:
        """bool [units, options]: which options there are."""
        return np.isfinite(self.cost)

    def smallest(self) -> Choice:
        """The smallest option of every unit; the cheaper of two of one size."""
        return np.lexsort((self.cost, np.where(self.offered, self.size, np.iinfo(np.int64).max)), axis=1)[:, 0]

    def costs_of(self, choice: Choice) -> np.ndarray:
        return self.cost[np.arange(len(choice)), choice]

    def sizes_of(self, choice: Choice) -> np.ndarray:
        return self.size[np.arange(len(choice)), choice]

    def total_cost(self, choice: Choice) -> float:
        return float(self.costs_of(choice).sum())

    def total_size(self, choice: Choice) -> int:
        return int(self.sizes_of(choice).sum())

    def hull(self, unit: int) -> list[int]:
        """The options on the lower convex hull of cost over size, smallest first: each bit gains less than the last.

        It ends at the cheapest option. Of options of one size only the cheapest can be on it.
        """
        size, cost = self.size[unit], self.cost[unit]
        found: list[int] = []
        for option in np.lexsort((cost, size)):
            if not np.isfinite(cost[option]) or (found and cost[option] >= cost[found[-1]]):
                continue
            while len(found) > 1 and _slope(size, cost, found[-2], found[-1]) <= _slope(size, cost, found[-1], option):
                found.pop()
            found.append(int(option))
        return found

    def filled(self, choice: Choice) -> Choice:
        """`choice` with what is left spent: the option of greatest saving per bit that fits, until none does."""
        choice = choice.copy()
        while True:
            size, cost = self.sizes_of(choice), self.costs_of(choice)
            more, saved = self.size - size[:, None], cost[:, None] - self.cost
            fits = (more > 0) & (saved > 0) & (more <= self.budget - size.sum())
            if not fits.any():
                return choice
            gain = np.where(fits, saved / np.where(fits, more, 1), -1.0)
            unit, option = np.unravel_index(np.argmax(gain), gain.shape)
            choice[unit] = option


def _slope(size, cost, a: int, b: int) -> float:
    """Of the cost per bit from option a to b, larger for a greater saving."""
    return (cost[a] - cost[b]) / (size[b] - size[a])
