"""The one sentence a run ends with, computed from its rows: did importance help here?

At every budget each order that comes from a score of the model (not a control, not reversed) is compared with the
random orders at the same bits per weight. It beats chance there when its perplexity is below every random seed's, and
it is worse than chance when above every one's; in between it is not told apart. The best control (first/last, parameter
count) is named where it does as well, because an order that loses to "protect the ends" has not shown that it looked at
the model.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from lq.runs.results import Row

CONTROLS = ("first_last", "parameter_count")


def conclude(rows: Sequence[Row]) -> str:
    """One sentence; says so when the run holds no comparison."""
    budgets = defaultdict(list)
    for row in rows:
        if row.group == "plan":
            budgets[row.target_bpw].append(row)
    verdicts, compared = defaultdict(lambda: [0, 0, 0]), 0
    control_wins = 0
    for mixed in budgets.values():
        chance = [_value(row) for row in mixed if row.order == "random"]
        scored = [row for row in mixed if is_score(row.order)]
        if not chance or not scored:
            continue
        compared += 1
        for row in scored:
            value = _value(row)
            verdicts[row.order][0 if value < min(chance) else 2 if value > max(chance) else 1] += 1
        controls = [_value(row) for row in mixed if row.order == "first_last"]
        control_wins += bool(controls) and min(controls) < min(_value(row) for row in scored)
    if not compared:
        return "No order was compared with random orders, so this run does not say whether importance helps."
    seeds = len({row.seed for row in rows if row.order == "random" and row.group == "plan"})
    parts = [f"{_label(order)} {_tell(*counts)}" for order, counts in verdicts.items()]
    sentence = f"Against {seeds} random orders at {compared} budgets, {'; '.join(parts)}"
    if any(row.order == "first_last" for row in rows):
        sentence += (
            f"; protecting the first and last blocks did better than every score at {control_wins} of {compared}"
        )
    helped = any(better > worse for better, _, worse in verdicts.values())
    clearly = any(better == compared for better, _, _ in verdicts.values())
    verdict = "importance helped here" if clearly else "importance helped a little here" if helped else None
    return f"{sentence}: {verdict or 'importance did not help here'}."


def _value(row: Row) -> float:
    return math.inf if math.isnan(row.perplexity) else row.perplexity


def is_score(order: str | None) -> bool:
    """Whether an order looks at the model: no control, and not reversed."""
    return order is not None and order.split()[0] not in (*CONTROLS, "random", "reverse")


def _label(order: str) -> str:
    return order.upper() if len(order) <= 3 else order


def _tell(better: int, between: int, worse: int) -> str:
    total = better + between + worse
    if better == total:
        return f"was better than all of them every time ({total} of {total})"
    if worse == total:
        return f"was worse than all of them every time ({total} of {total})"
    return f"was better than all of them at {better}, among them at {between}, worse than all at {worse}"
