"""How far two scores agree: Spearman's correlation of ranks, and how many of the most important units both name.

Two orders of the same units may differ by what the scores look at, or by the text that they happened to see. For the
second there are intervals: the text is cut into parts, each is scored for itself, and a bootstrap (Efron, Annals of
Statistics 7, 1979; percentiles) draws parts with replacement, averages the scores of those drawn, and compares again. A
score that reads no text is the same in every part. The intervals say nothing of other models or other units.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.scores import Scores

DRAWS = 2000  # of the bootstrap
COVERED = 95  # percent of them lie within an interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of two scores of the same units. Intervals are None where the text was not cut into parts."""

    spearman: float  # -1 to 1; NaN where one of the scores tells no units apart
    common: int  # of the `top` most important units of either, how many are among the other's
    top: int
    spearman_interval: tuple[float, float] | None = None
    common_interval: tuple[float, float] | None = None


def parts_of(windows: Windows, count: int) -> list[Windows]:
    """The windows in so many parts, as equal as can be. Raises UserError for more parts than windows."""
    if count > len(windows.tokens):
        raise UserError(f"parts: {count} of {len(windows.tokens)} windows; write fewer, or give more text")
    cut = np.array_split(windows.tokens, count)
    return [dataclasses.replace(windows, tokens=part, how=f"{windows.how}, a part") for part in cut]


def agreement(
    first: Scores,
    second: Scores,
    parts: tuple[Sequence[Scores], Sequence[Scores]] | None = None,
    *,
    top: int | None = None,
    seed: int = 0,
) -> Agreement:
    """Compares two scores of the same units.

    Args:
      first, second: of all text.
      parts: both, of each part of the text in turn, for intervals; of a score that reads no text one for all.
      top: how many units count as the most important; a quarter of them, at least one, when None.
      seed: of the bootstrap.

    Raises:
      UserError: units that differ, or a `top` beyond them.
    """
    units = list(first.values)
    if units != list(second.values):
        raise UserError(f"scores {first.metric} and {second.metric}: of different units; score both by the same unit")
    top = max(1, len(units) // 4) if top is None else top
    if not 1 <= top <= len(units):
        raise UserError(f"top: {top} of {len(units)} units; write 1 to {len(units)}")
    a, b = _values([first]), _values([second])
    found = Agreement(spearman=float(spearman(a, b)[0]), common=int(common(a, b, top)[0]), top=top)
    if parts is None:
        return found
    of_parts = [_values(side) for side in parts]
    count = max(map(len, of_parts))
    drawn = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    a, b = (side[drawn if len(side) > 1 else 0 * drawn].mean(axis=1) for side in of_parts)
    return dataclasses.replace(
        found, spearman_interval=_interval(spearman(a, b)), common_interval=_interval(common(a, b, top))
    )


def spearman(
    a: Float[np.ndarray, "*orders units"], b: Float[np.ndarray, "*orders units"]
) -> Float[np.ndarray, "*orders"]:
    """Pearson's correlation of the ranks, equal values sharing their mean rank (Spearman 1904); NaN for all equal."""
    middle = (a.shape[-1] + 1) / 2
    ranks = [rankdata(values, axis=-1) - middle for values in (a, b)]
    lengths = [np.linalg.norm(rank, axis=-1) for rank in ranks]
    with np.errstate(invalid="ignore"):
        return np.sum(ranks[0] * ranks[1], axis=-1) / (lengths[0] * lengths[1])


def common(
    a: Float[np.ndarray, "*orders units"], b: Float[np.ndarray, "*orders units"], top: int
) -> Int[np.ndarray, "*orders"]:
    """How many units are among the `top` largest of both; of equal ones the earlier is the larger."""
    largest = [np.argsort(np.argsort(-values, axis=-1, kind="stable"), axis=-1) < top for values in (a, b)]
    return np.sum(largest[0] & largest[1], axis=-1)


def _values(scores: Sequence[Scores]) -> Float[np.ndarray, "scores units"]:
    return np.array([list(of.values.values()) for of in scores], np.float64)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [(100 - COVERED) / 2, (100 + COVERED) / 2])
    return float(low), float(high)
