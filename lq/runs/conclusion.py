"""The one sentence a run ends with, computed from its rows: did importance help here?

At every budget each order that comes from a score of the model (not a control, not reversed) is compared with the
random orders at the same bits per weight. It beats chance there when its perplexity is below every random seed's, and
it is worse than chance when above every one's; in between it is not told apart. It is compared with its controls too:
an order that loses to "protect the ends", or to itself read backwards, has not shown that it looked at the model.
Budgets where all orders have one perplexity (nothing is mixed there, or everything collapsed) compare nothing.

    helped           some score beats every random order and each of its controls at every budget
    helped a little  some score beats every random order at more than half of the budgets, and loses to all at none

A worthless order is the best of n + 1 with probability 1 / (n + 1) at one budget, and at all of them together no more
often. So nothing is said of fewer than three random orders, and where importance helped the sentence names that bound,
times the scores that were tried.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

from lq.runs.results import Row

CONTROLS = ("first_last", "ends_random", "k_quant", "parameter_count")
FEWEST_SEEDS = 3

Budget = dict[str, list[float]]  # order -> perplexity of each of its plans


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """At how many budgets a score's order was better or worse than what."""

    score: str
    better: int = 0  # than every random order
    worse: int = 0  # than every random order
    beat_controls: int = 0  # better than every one of `controls`
    controls: tuple[str, ...]  # those the run holds: of `CONTROLS`, and reverse
    missing: tuple[str, ...]  # those of first_last and reverse that it lacks


def conclude(rows: Sequence[Row]) -> str:
    """One sentence; says so when the run holds no comparison, or one of too few random orders."""
    compared = [b for b in _budgets(rows) if "random" in b and any(map(is_score, b))]
    if not compared:
        return "No order was compared with random orders, so this run does not say whether importance helps."
    mixed = [b for b in compared if len({value for values in b.values() for value in values}) > 1]
    if not mixed:
        return "At no budget did the orders differ in perplexity, so this run does not say whether importance helps."
    seeds = min(len(b["random"]) for b in mixed)
    chance = f"{seeds} random order{'s' if seeds > 1 else ''}"
    if seeds < FEWEST_SEEDS:
        return f"This run compares with {chance}, and it takes {FEWEST_SEEDS} or more to say whether importance helps."
    tallies = [_tally(score, mixed) for score in dict.fromkeys(order for b in mixed for order in b if is_score(order))]
    controls = ", ".join(dict.fromkeys(kind for tally in tallies for kind in tally.controls))
    against = f"{chance} and the controls {controls}" if controls else chance
    budgets = f"{len(mixed)} budget{'s' if len(mixed) > 1 else ''}"
    return f"Against {against} at {budgets}, {'; '.join(map(_tell, tallies))}: {_verdict(tallies, len(mixed), seeds)}."


def is_score(order: str | None) -> bool:
    """Whether an order looks at the model: no control, and not reversed."""
    return order is not None and order.split()[0] not in (*CONTROLS, "random", "reverse")


def _budgets(rows: Sequence[Row]) -> list[Budget]:
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.group == "plan" and row.order is not None:
            found[row.target_bpw][row.order].append(math.inf if math.isnan(row.perplexity) else row.perplexity)
    return [dict(orders) for orders in found.values()]


def _tally(score: str, budgets: Sequence[Budget]) -> Tally:
    reverse = ["reverse", score.split()[0]]
    names = dict.fromkeys(order for b in budgets for order in b if order in CONTROLS or order.split()[:2] == reverse)
    kinds = {name if name in CONTROLS else "reverse" for name in names}
    counts = defaultdict(int)
    for b in (b for b in budgets if score in b):
        value, chance = max(b[score]), b["random"]
        counts["better"] += value < min(chance)
        counts["worse"] += value > max(chance)
        counts["beat_controls"] += all(value < min(b[name]) for name in names if name in b)
    missing = tuple(kind for kind in ("first_last", "reverse") if kind not in kinds)
    return Tally(score=score, controls=tuple(sorted(kinds)), missing=missing, **counts)


def _tell(tally: Tally) -> str:
    label = tally.score.upper() if len(tally.score) <= 3 else tally.score
    text = f"{label} was better than all random orders at {tally.better}, worse than all at {tally.worse}"
    return f"{text}, better than its controls at {tally.beat_controls}" if tally.controls else text


def _verdict(tallies: Sequence[Tally], budgets: int, seeds: int) -> str:
    won = [tally for tally in tallies if tally.better == tally.beat_controls == budgets]
    if any(not tally.missing for tally in won):
        often = min(len(tallies), seeds + 1)
        return f"importance helped here, as chance alone would have it in at most {often} of {seeds + 1} runs"
    if won:
        return f"importance did better than chance here, but was not compared with {' and '.join(won[0].missing)}"
    if any(tally.better > budgets / 2 and not tally.worse for tally in tallies):
        return "importance helped a little here"
    return "importance did not help here"
