"""`Problem`: units, options, what each option costs and how large it is, and a budget. What every solver takes.

    minimize  sum over k of cost[k, choice_k]    such that    sum over k of size[k, choice_k] <= budget

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11). Costs are
predicted losses, of any unit; only their ratios matter.

Two things may be added. A latency of every option, in whole nanoseconds, whose sum has a limit of its own: all solvers
respect it. And what pairs of units lose beyond the sum of both (`Interactions`): `quadratic` alone looks at it, the
others go by `cost`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from lq.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For a solver without choices."""


DEFAULT = NoOptions()
MOST_COST = 1e200  # beyond it what solvers make of costs, sums of them and products with sizes, may be no numbers
Choice = Int[np.ndarray, " units"]  # the option of every unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interactions:
    """What pairs of units lose beyond the sum of both: terms[p, o, q] where units a and b of pair p have options o and
    q. Every pair once; ValueError for anything else."""

    pairs: Int[np.ndarray, "pairs 2"]
    terms: Float[np.ndarray, "pairs options options"]

    def __post_init__(self):
        fits = self.pairs.ndim == 2 and self.pairs.shape[1] == 2 and self.pairs.dtype.kind in "iu"
        if not fits or self.terms.ndim != 3 or len(self.terms) != len(self.pairs):
            raise ValueError(f"pairs {self.pairs.shape} of {self.pairs.dtype} and terms {self.terms.shape}")
        once = {frozenset(pair) for pair in self.pairs.tolist()}
        if len(once) != len(self.pairs) or any(len(pair) != 2 for pair in once):
            raise ValueError("a pair that is listed twice, or a unit paired with itself")
        if not np.isfinite(self.terms).all():
            raise ValueError("a term that is not finite")

    def scaled(self, shares: Float[np.ndarray, " units"]) -> "Interactions":
        """Those of parts of the units: of what a pair loses, the product of both shares."""
        return dataclasses.replace(self, terms=self.terms * shares[self.pairs].prod(1)[:, None, None])

    def of(self, choice: Choice) -> float:
        """The sum over all pairs."""
        a, b = choice[self.pairs].T
        return float(self.terms[np.arange(len(self.pairs)), a, b].sum())

    def field(self, choice: Choice) -> Float[np.ndarray, "units options"]:
        """What every option of every unit adds to the pairs that the unit is in, all others being as in `choice`."""
        found = np.zeros((len(choice), self.terms.shape[1]))
        which, (a, b) = np.arange(len(self.pairs)), self.pairs.T
        np.add.at(found, a, self.terms[which, :, choice[b]])
        np.add.at(found, b, self.terms[which, choice[a], :])
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Raises UserError for a budget or a limit that no choice meets and for costs above `MOST_COST`, and ValueError for
    arrays that do not fit each other. Where there is a choice for the budget and one for the limit, but none for both,
    solvers say so."""

    cost: Float[np.ndarray, "units options"]  # finite, or infinite where a unit does not have the option
    size: Int[np.ndarray, "units options"]  # bits with metadata
    budget: int  # bits
    latency: Int[np.ndarray, "units options"] | None = None  # nanoseconds
    limit: int = 0  # nanoseconds; of the sum, where there are latencies
    interactions: Interactions | None = None

    def __post_init__(self):
        if self.cost.shape != self.size.shape or self.cost.ndim != 2 or self.size.dtype.kind not in "iu":
            raise ValueError(f"cost {self.cost.shape} and size {self.size.shape} of {self.size.dtype}")
        if np.isnan(self.cost).any() or not self.offered.any(1).all():
            raise ValueError("a cost that is NaN, or a unit without options")
        if (largest := np.abs(np.where(self.offered, self.cost, 0.0)).max(initial=0.0)) > MOST_COST:
            raise UserError(
                f"costs: as large as {largest:g}, where the most is {MOST_COST:g}; score again, or write costs place"
            )
        if self.interactions is not None:
            self._check_pairs(self.interactions)
        if (least := int(self.sizes_of(self.smallest()).sum())) > self.budget:
            raise UserError(f"budget: {self.budget} bits cannot be met; the least is {least}")
        if self.latency is not None:
            if self.latency.shape != self.cost.shape or self.latency.dtype.kind not in "iu":
                raise ValueError(f"cost {self.cost.shape} and latency {self.latency.shape} of {self.latency.dtype}")
            if (least := int(np.where(self.offered, self.latency, np.iinfo(np.int64).max).min(1).sum())) > self.limit:
                raise self.too_slow(least)

    def _check_pairs(self, interactions: Interactions) -> None:
        units, options = self.cost.shape
        pairs, terms = interactions.pairs, interactions.terms
        if len(pairs) and (terms.shape[1:] != (options, options) or not 0 <= pairs.min() <= pairs.max() < units):
            raise ValueError(f"cost {self.cost.shape} and pairs of other units or options {terms.shape}")

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

    def latencies_of(self, choice: Choice) -> np.ndarray:
        """Nanoseconds; 0 where there are no latencies."""
        return np.zeros(len(choice), int) if self.latency is None else self.latency[np.arange(len(choice)), choice]

    def total_cost(self, choice: Choice) -> float:
        """Of the units alone."""
        return float(self.costs_of(choice).sum())

    def total_size(self, choice: Choice) -> int:
        return int(self.sizes_of(choice).sum())

    def total_latency(self, choice: Choice) -> int:
        return int(self.latencies_of(choice).sum())

    def objective(self, choice: Choice) -> float:
        """The cost of the units and of their pairs."""
        return self.total_cost(choice) + (self.interactions.of(choice) if self.interactions else 0.0)

    def fits(self, choice: Choice) -> bool:
        """Whether the budget holds, and the limit."""
        return self.total_size(choice) <= self.budget and (
            self.latency is None or self.total_latency(choice) <= self.limit
        )

    def within(self, choice: Choice) -> np.ndarray:
        """bool [units, options]: what a unit alone may change to, budget and limit holding; itself is among them."""
        more = self.size - self.sizes_of(choice)[:, None]
        fits = self.offered & (more <= self.budget - self.total_size(choice))
        if self.latency is not None:
            longer = self.latency - self.latencies_of(choice)[:, None]
            fits &= longer <= self.limit - self.total_latency(choice)
        return fits

    def too_slow(self, least: int) -> UserError:
        """That the limit cannot be met, `least` being the least latency that can."""
        most = int(np.where(self.offered, self.latency, 0).max(1).sum())
        return UserError(
            f"latency: {_seconds(self.limit)} s cannot be met within {self.budget} bits; "
            f"{_seconds(least)} to {_seconds(most)} s can"
        )

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
            fits = (more > 0) & (saved > 0) & self.within(choice)
            if not fits.any():
                return choice
            gain = np.where(fits, saved / np.where(fits, more, 1), -1.0)
            unit, option = np.unravel_index(np.argmax(gain), gain.shape)
            choice[unit] = option


def _slope(size, cost, a: int, b: int) -> float:
    """Of the cost per bit from option a to b, larger for a greater saving."""
    return (cost[a] - cost[b]) / (size[b] - size[a])


def _seconds(nanoseconds: int) -> str:
    """Seconds, exactly: what is shown can be copied into the next command."""
    return f"{nanoseconds / 1e9:.9f}".rstrip("0").rstrip(".")
