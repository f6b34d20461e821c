"""How many of a sorted list may be lowered until a target is missed: bisection, level after level.

It asks log2 of the number of units at every level, where one unit after the other would be asked for each. It takes the
loss to rise along the list; where it does not, what is returned still meets the target, though more might have.

Source: Schaefer et al., arXiv 2306.04879, and 2302.01382 before it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lq.allocation.problem import Choice


def longest_prefix(count: int, meets: Callable[[int], bool]) -> int:
    """The most of `count` for which `meets` holds, which is taken to hold for none, and to hold for all below."""
    if meets(count):
        return count
    below, above = 0, count  # holds, and does not
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if meets(middle) else (below, middle)
    return below


def lowered(order: Sequence[int], options: Sequence[int], meets: Callable[[Choice], bool]) -> Choice:
    """An option for every unit: first at the largest, then as many as may be at the next smaller one, and so on.

    Args:
      order: of all units, the least sensitive first.
      options: from the largest to the smallest.
      meets: whether a choice meets the target; all units at the largest do.
    """
    choice, most = np.full(len(order), options[0]), len(order)

    def changed(count: int, option: int) -> Choice:
        found = choice.copy()
        found[list(order[:count])] = option
        return found

    for option in options[1:]:
        # Only what went down last time can go down further.
        most = longest_prefix(most, lambda count, option=option: meets(changed(count, option))) if most else 0
        choice = changed(most, option)
    return choice
