"""What a search asks and what it gives: a loss, and generation after generation the best plan so far."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lq.allocation.problem import Choice

# (choices, windows of text) -> what each loses on them
Loss = Callable[[Sequence[Choice], Sequence[int]], Float[np.ndarray, " choices"]]


class Evaluated(NamedTuple):
    """A choice and what it loses."""

    choice: Choice
    loss: float


class Generation(NamedTuple):
    """The parent behind a generation, and what it lost on the text it was judged on last."""

    parent: Choice
    loss: float
    front: tuple[Evaluated, ...] = ()  # of searches that look for all sizes: those no other beats, smallest first
