"""What a reader compares: the rows of a run in groups, random orders averaged, the best order of each budget marked.

Values in, values out, no drawing. The terminal, the page and the figures all read from here, so they cannot disagree.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable

from lq.runs.results import Group, Results, Row

REVERSED = "reverse "  # prefix of an order that is another one read backwards
RANDOM = "random"

NONE = "\N{EN DASH}"  # in place of a number that was not measured
TIMES = "\N{MULTIPLICATION SIGN}"

_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table, one point of a curve: a measured model, or the mean over the seeds of a random order."""

    label: str
    rows: tuple[Row, ...]
    best: bool = False  # the lowest finite perplexity among the plans of its budget

    @property
    def order(self) -> str | None:
        return self.rows[0].order

    @property
    def bpw(self) -> float:
        return statistics.fmean(row.bpw for row in self.rows)

    @property
    def code_bits(self) -> float:
        return statistics.fmean(row.code_bits for row in self.rows)

    @property
    def perplexity(self) -> float:
        """The mean; not finite when one row's is not."""
        return sum(row.perplexity for row in self.rows) / len(self.rows)

    def mean(self, field: str) -> float | None:
        """Mean of any numeric field over the rows; None when a row lacks it, not finite when a value is not."""
        values = [getattr(row, field) for row in self.rows]
        return None if any(value is None for value in values) else sum(values) / len(values)

    def spread(self, field: str) -> tuple[float, float]:
        """The lowest and the highest value of a field over the rows; NaN counts as the highest."""
        values = sorted((getattr(row, field) for row in self.rows), key=lambda v: (math.isnan(v), v))
        return values[0], values[-1]

    def deviation(self, field: str) -> float | None:
        """Sample standard deviation over the rows; None for one row, or where a value is not finite."""
        values = [getattr(row, field) for row in self.rows]
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Lines that are read together, under a heading."""

    heading: str
    group: Group
    lines: tuple[Line, ...]


def original(results: Results) -> Row | None:
    """The row of the unquantized model, if it was measured."""
    return next((row for row in results.rows if row.group == "original"), None)


def budget(row: Row) -> float:
    """The budget a plan belongs to: its target, or its own size when none was set."""
    return round(row.bpw, 2) if row.target_bpw is None else row.target_bpw


def order_of(row: Row) -> str:
    """The order a plan or a step of the sweep belongs to; plans without one are kept together."""
    return row.order or "plan"


def sections(results: Results) -> list[Section]:
    """The rows in reading order, without the sweep: original, uniform, finer groups, then the plans of each budget.

    Within a budget the lines are sorted by perplexity and the best is marked. Empty sections are left out.
    """
    fixed: list[tuple[str, Group]] = [
        ("Original", "original"),
        ("Uniform", "uniform"),
        ("Uniform, finer groups", "finer_groups"),
    ]
    found = []
    for heading, group in fixed:
        lines = [Line(label=row.name, rows=(row,)) for row in results.rows if row.group == group]
        lines.sort(key=lambda line: -line.bpw)
        found.append(Section(heading=heading, group=group, lines=tuple(lines)))
    plans = [row for row in results.rows if row.group == "plan"]
    for target in sorted({budget(row) for row in plans}, reverse=True):
        lines = sorted(_merge_seeds(row for row in plans if budget(row) == target), key=_by_perplexity)
        if math.isfinite(lines[0].perplexity):
            lines[0] = dataclasses.replace(lines[0], best=True)
        heading = f"Plans, budget {target:g} bits per weight"
        found.append(Section(heading=heading, group="plan", lines=tuple(lines)))
    return [section for section in found if section.lines]


def plan_curves(results: Results) -> dict[str, list[Line]]:
    """Order -> its lines at every budget, by size."""
    curves: dict[str, list[Line]] = {order: [] for order in orders(results)}
    for section in sections(results):
        for line in section.lines if section.group == "plan" else ():
            curves[order_of(line.rows[0])].append(line)
    return {order: sorted(lines, key=lambda line: line.bpw) for order, lines in curves.items() if lines}


def sweep_curves(results: Results) -> dict[str, list[tuple[int, Line]]]:
    """Order -> (blocks lowered so far, line), for the rows that lower the blocks one by one."""
    curves = {}
    moves = [row for row in results.rows if row.group == "move"]
    for order in orders(results):
        rows = sorted((row for row in moves if order_of(row) == order), key=lambda row: -row.code_bits)
        by_count: dict[int, list[Row]] = {}
        for position, row in enumerate(rows):
            by_count.setdefault(_lowered(row, rows[0], position), []).append(row)
        if rows:
            curves[order] = [(n, Line(label=same[0].name, rows=tuple(same))) for n, same in sorted(by_count.items())]
    return curves


def orders(*runs: Results) -> list[str]:
    """Every order that occurs: scores first, as they come, then random, then the reversed ones."""
    names = dict.fromkeys(order_of(row) for results in runs for row in results.rows if row.group in ("plan", "move"))
    return sorted(names, key=lambda name: (name.startswith(REVERSED), name == RANDOM))


def _merge_seeds(rows: Iterable[Row]) -> list[Line]:
    """Rows of one order that differ in their seed become one line; every other row is a line of its own."""
    merged: dict[tuple, list[Row]] = {}
    for row in rows:
        merged.setdefault((row.order, None if row.seed is not None else row.name), []).append(row)
    counts: dict[str, int] = {}
    for same in merged.values():
        counts[order_of(same[0])] = counts.get(order_of(same[0]), 0) + 1
    lines = []
    for same in merged.values():
        order = order_of(same[0])
        label = order if counts[order] == 1 else same[0].name  # two plans of one order need their full names
        lines.append(Line(label=f"{label}, {len(same)} seeds" if len(same) > 1 else label, rows=tuple(same)))
    return lines


def _by_perplexity(line: Line) -> tuple:
    value = line.perplexity
    return not math.isfinite(value), math.isnan(value), value


def _lowered(row: Row, start: Row, position: int) -> int:
    """How many blocks are below their width at the start; the position in the sweep when widths are unknown."""
    if not row.bits_per_block or len(row.bits_per_block) != len(start.bits_per_block):
        return position
    return sum(now < then - 1e-9 for now, then in zip(row.bits_per_block, start.bits_per_block, strict=True))


def format_number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, trailing zeros kept; powers of ten from 10 000 up and below 0.0001."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -4 <= int(exponent) < max(4, digits):
        return f"{value:.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}{TIMES}{_power(int(exponent))}"


def format_tick(value: float) -> str:
    """A round number at a log axis: plain while it is short, a power of ten beyond."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{'' if mantissa == '1' else mantissa + TIMES}{_power(int(exponent))}"


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def format_bytes(count: float | None) -> str:
    """Megabytes (10^6), without the unit: three significant digits or every whole megabyte."""
    if count is None:
        return NONE
    megabytes = count / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 100 else format_number(megabytes, 3)
