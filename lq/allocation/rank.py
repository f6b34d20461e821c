"""Rank-and-threshold: the order of the scores decides, their size does not (Dumitru et al., arXiv 2406.17415, section
3).

With two widths this is the paper's rule: blocks in order of importance get the higher width while the budget lasts, the
rest the lower one. With more widths the thresholds must be chosen, and are, by the least expected error

    sum_l  r_l n_l 4^(-b_l),      r_l = (L - rank of l) / L,   n_l weights

under the budget: everything starts at the lowest width and the step of greatest gain per bit is taken while it fits.
4^(-b) is convex in b and r_l falls with the rank, so among units of equal shape a more important one never gets fewer
bits. A step that does not fit is passed over and the next is tried, so that less than the smallest remaining step of
the budget is left unspent.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Rank-and-threshold has none."""


def rank(
    ranking: Sequence[str],
    sizes: Mapping[str, Mapping[int, int]],
    budget_bits: int,
    options: RankOptions,
) -> dict[str, int]:
    """Widths by the place in the order alone: the most important units get the most bits.

    Args:
      ranking: units, most important first.
      sizes: unit -> width -> bits it then occupies, metadata included; every unit offers at least one width.
      budget_bits: the sum of sizes never exceeds it. It must reach every unit's smallest.
      options: none.

    Returns:
      unit -> width.
    """
    del options
    widths = {unit: sorted(sizes[unit]) for unit in ranking}
    level = dict.fromkeys(ranking, 0)
    left = budget_bits - sum(sizes[unit][widths[unit][0]] for unit in ranking)
    place = {unit: i for i, unit in enumerate(ranking)}

    def next_step(unit: str):
        """(minus gain per bit of code, rank, unit): the least is taken first. Equal gains go to the better rank."""
        low, high = widths[unit][level[unit]], widths[unit][level[unit] + 1]
        gain = (len(ranking) - place[unit]) * (4.0**-low - 4.0**-high) / (high - low)
        return (-gain, place[unit], unit)

    steps = [next_step(unit) for unit in ranking if len(widths[unit]) > 1]
    heapq.heapify(steps)
    while steps:
        _, _, unit = heapq.heappop(steps)
        low, high = widths[unit][level[unit]], widths[unit][level[unit] + 1]
        step = sizes[unit][high] - sizes[unit][low]
        if step > left:
            continue  # it will not fit later either: what is left only shrinks
        left -= step
        level[unit] += 1
        if level[unit] + 1 < len(widths[unit]):
            heapq.heappush(steps, next_step(unit))
    return {unit: widths[unit][level[unit]] for unit in ranking}
