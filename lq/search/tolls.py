"""Plans of costs around an incumbent, in fewer and fewer steps from it: a line search over plans.

Costs of single steps say nothing of what several do together. Where a plan of them loses more than was foreseen, too
many were taken at once: every step is charged with a toll, so that those that pay least are left out.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from lq.allocation import ALLOCATORS
from lq.allocation.problem import Choice, Problem

TOLLS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of what a step is foreseen to save on average


def with_tolls(
    problem: Problem, incumbent: Choice, cost: Float[np.ndarray, "units options"], allocator: str = "knapsack"
) -> Iterator[Choice]:
    """What the allocator makes of `cost` and one toll after the other, each choice once, the incumbent never.

    Args:
      problem: sizes and budget.
      incumbent: where every unit is.
      cost: what a step to an option changes the loss by, 0 at the incumbent's; infinite where there is none.
      allocator: a name in `ALLOCATORS`.
    """
    method, seen, toll = ALLOCATORS[allocator], {np.asarray(incumbent).tobytes()}, 0.0
    for share in TOLLS:
        charged = cost + share * toll
        charged[np.arange(len(incumbent)), incumbent] = 0.0
        priced = dataclasses.replace(problem, cost=charged)
        choice = np.asarray(method.function(priced, ALLOCATORS.options(allocator, {})))
        if choice.tobytes() in seen:
            continue
        seen.add(choice.tobytes())
        if not share:
            steps = int((choice != incumbent).sum())
            toll = max(-float(cost[np.arange(len(choice)), choice].sum()) / steps, 0.0)
        yield choice
