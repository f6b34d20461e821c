"""The second constraint: a limit for the sum of latencies, and the table that they are read from.

Latencies are measured per matrix and option, on the device that is meant, for the batch that is meant; their sum leaves
out what the options do not change. They are held in whole nanoseconds, options rounded up and the limit down, so that
every solver keeps the limit exactly. A wider option need not be a slower one: three bits may take longer than four.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from lq.allocation.milp import quickest
from lq.allocation.problem import Choice, Problem
from lq.errors import UserError

NANOSECONDS = 10**9  # in a second
MOST_SECONDS = 3600  # of one matrix, and of all: nanoseconds written as seconds, and sums beyond 64 bits, are refused
GRAIN = 1e-6  # of a nanosecond: what writing a whole number of them as seconds may add


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyLimit:
    """What the matrices that are free may take together. Raises UserError unless `seconds` is a time."""

    table: Path  # see `read_latency`
    seconds: float

    def __post_init__(self):
        limit_of(self.seconds)


def settled(problem: Problem, choice: Choice) -> Choice:
    """`choice`, which the budget allows, brought within the limit; then what is left is spent.

    Of the options that fit, the one that costs least for every nanosecond it saves is taken, until the limit holds.
    Where none is left, it is the quickest choice of all that is filled up. Raises UserError when even that is too slow.
    """
    choice = choice.copy()
    while problem.total_latency(choice) > problem.limit and problem.latency is not None:
        saved = problem.latencies_of(choice)[:, None] - problem.latency
        more = problem.size - problem.sizes_of(choice)[:, None]
        fits = problem.offered & (saved > 0) & (more <= problem.budget - problem.total_size(choice))
        if not fits.any():
            choice = quickest(problem)
            break
        lost = np.where(problem.offered, problem.cost, 0.0) - problem.costs_of(choice)[:, None]
        price = np.where(fits, lost / np.where(fits, saved, 1), np.inf)
        unit, option = np.unravel_index(np.argmin(price), price.shape)
        choice[unit] = option
    return problem.filled(choice)


def read_latency(
    path: Path, units: Mapping[str, Sequence[str]], options: Sequence[str]
) -> Int[np.ndarray, "units options"]:
    """What every unit takes under every option, nanoseconds: the sum over its matrices.

    Args:
      path: a JSON file, `{"block_0/mlp/up_proj": {"int4-g128": 1.2e-05, ...}, ...}`, in seconds.
      units: unit -> the paths of its matrices.
      options: names of the specs (`str(QuantSpec)`), in order.

    Raises:
      UserError: no such file, or one without an entry that is needed, or one that is no time.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such latency table; write one, matrix path -> option -> seconds") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a latency table ({error}); write matrix path -> option -> seconds") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory; give a JSON file, matrix path -> option -> seconds") from None
    if not isinstance(table, dict) or not all(isinstance(of_matrix, dict) for of_matrix in table.values()):
        raise UserError(f"{path}: not a latency table; write matrix path -> option -> seconds")
    found = [
        [sum(_nanoseconds(path, table, matrix, option) for matrix in paths) for option in options]
        for paths in units.values()
    ]
    return np.array(found, np.int64).reshape(len(units), len(options))


def limit_of(seconds: float) -> int:
    """A limit in nanoseconds, rounded down. Raises UserError unless it is a time."""
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (number and 1 / NANOSECONDS <= seconds <= MOST_SECONDS):
        raise UserError(f"latency: {seconds!r} seconds; write a number such as 0.02, from 1e-9 to {MOST_SECONDS}")
    return math.floor(seconds * NANOSECONDS + GRAIN)


def _nanoseconds(path: Path, table: dict, matrix: str, option: str) -> int:
    """Rounded up."""
    seconds = table.get(matrix, {}).get(option)
    if seconds is None:
        raise UserError(f"{path}: no {option} of {matrix}; measure it, or leave the option out")
    if type(seconds) not in (int, float) or not 0 <= seconds <= MOST_SECONDS:
        raise UserError(f"{path}: {option} of {matrix}: {seconds!r} is no time in seconds; measure it again")
    return math.ceil(seconds * NANOSECONDS - GRAIN)
