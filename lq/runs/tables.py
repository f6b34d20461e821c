"""The columns every table of a run shows, the table for the terminal, and the CSV file with every row whole."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from itertools import zip_longest

from lq.runs.results import Results, Row
from lq.runs.summary import NONE, Line, format_bytes, format_number, original, sections

EXPENDABLE = ("disk MB", "device MB", "ratio", "top-1 %")  # columns a narrow terminal does without


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One measured number: its heading, and how a line shows it. `base` is the original model's perplexity."""

    heading: str
    meaning: str
    show: Callable[[Line, float | None], str]
    exact: Callable[[Line], str] | None = None  # the whole number behind a rounded one


def _mean(field: str, form: Callable[[float | None], str]) -> Callable[[Line, float | None], str]:
    return lambda line, base: form(line.mean(field))


def _fixed(digits: int, scale: float = 1.0) -> Callable[[float | None], str]:
    return lambda value: NONE if value is None else f"{value * scale:.{digits}f}"


def _bytes(field: str) -> Callable[[Line], str]:
    return lambda line: "" if line.mean(field) is None else f"{line.mean(field):,.0f} bytes"


def _perplexity(line: Line, base: float | None) -> str:
    """The value; for several seeds the mean and, on a second text line, the lowest and the highest."""
    mean, deviation = line.perplexity, line.deviation("perplexity")
    if len(line.rows) == 1:
        return format_number(mean)
    low, high = map(format_number, line.spread("perplexity"))
    plus_minus = "" if deviation is None else f" ± {format_number(deviation, 2)}"
    return f"{format_number(mean)}{plus_minus}\n{low}{NONE}{high}"


def _ratio(line: Line, base: float | None) -> str:
    return format_number(line.perplexity / base if base else None)


COLUMNS = (
    Column(heading="code bits", meaning="mean width of the stored codes", show=_mean("code_bits", _fixed(3))),
    Column(
        heading="bpw",
        meaning="bits per weight, with scales and zero points: what the memory really costs",
        show=_mean("bpw", _fixed(3)),
    ),
    Column(heading="perplexity", meaning="by the protocol above; lower is better", show=_perplexity),
    Column(heading="ratio", meaning="perplexity divided by the original's", show=_ratio),
    Column(
        heading="KL",
        meaning="mean KL divergence from the original per token, nats",
        show=_mean("kl", format_number),
    ),
    Column(
        heading="top-1 %",
        meaning="tokens whose most likely next token is the original's",
        show=_mean("top1", _fixed(1, 100)),
    ),
    Column(
        heading="disk MB",
        meaning="packed weights on disk, 10⁶ bytes",
        show=_mean("bytes_on_disk", format_bytes),
        exact=_bytes("bytes_on_disk"),
    ),
    Column(
        heading="device MB",
        meaning="parameters on the device, 10⁶ bytes",
        show=_mean("bytes_on_device", format_bytes),
        exact=_bytes("bytes_on_device"),
    ),
)


def filled_columns(*runs: Results) -> list[Column]:
    """The columns in which some row of some run has a number; all of them when there are no rows."""
    lines = [(Line(label=row.name, rows=(row,)), base_perplexity(run)) for run in runs for row in run.rows]
    filled = [column for column in COLUMNS if any(column.show(line, base) != NONE for line, base in lines)]
    return filled or list(COLUMNS)


def base_perplexity(run: Results) -> float | None:
    """That of the original, when it was measured."""
    base = original(run)
    return base.perplexity if base else None


def format_table(results: Sequence[tuple[str, Results]], width: int = 80) -> str:
    """Plain text for a terminal or a file: the lines of every run, grouped as in the page, without the sweep.

    Args:
        results: (name, results) per run; the names are shown when there are several.
        width: characters there are. Columns are left out until the table fits, in the order of `EXPENDABLE`; those that
            no row fills are not there at all.
    """
    columns = filled_columns(*(run for _, run in results))
    heads = [("", "")] + [column.heading.rpartition(" ")[::2] for column in columns]
    grid: list[str | tuple[str, ...]] = list(zip(*heads, strict=True))  # headings span the table, cells are tuples
    rule, longest = len(grid), max(26, width - 54)
    for name, run in results:
        base = base_perplexity(run)
        grid += ["", f"== {name} =="] if len(results) > 1 else []
        for section in sections(run):
            grid += ["", section.heading]
            for line in section.lines:
                label = f"{'*' if line.best else ' '} {line.label}"
                label = label if len(label) <= longest else label[: longest - 1] + "…"
                cells = [column.show(line, base).split("\n") for column in columns]
                grid += zip_longest([label], *cells, fillvalue="")
    rows = [row for row in grid if isinstance(row, tuple)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    shown = list(range(len(widths)))
    omitted = []
    headings = [column.heading for column in columns]
    for heading in EXPENDABLE:
        if heading in headings and sum(widths[i] + 2 for i in shown) - 2 > width:
            shown.remove(1 + headings.index(heading))
            omitted.append(heading)
    texts = [row if isinstance(row, str) else _align(row, widths, shown) for row in grid]
    texts.insert(rule, "─" * max(map(len, texts[:rule])))
    notes = []
    if any(line.best for _, run in results for section in sections(run) for line in section.lines):
        notes.append("* best order of its budget")
    if omitted:
        notes.append(f"too narrow for {', '.join(omitted)}: see the report")
    texts += ["", *notes] if notes else []
    return "\n".join(text.rstrip() for text in texts)


def _align(row: Sequence[str], widths: Sequence[int], shown: Sequence[int]) -> str:
    """The first cell to the left, the numbers to the right."""
    return "  ".join(row[i].rjust(widths[i]) if i else row[i].ljust(widths[i]) for i in shown)


def csv_text(results: Sequence[tuple[str, Results]]) -> str:
    """Every row of every run, every field, after the name of the run. Widths per block are separated by spaces."""
    fields = [field.name for field in dataclasses.fields(Row)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *fields])
    for name, run in results:
        for row in run.rows:
            values = {field: getattr(row, field) for field in fields}
            values["bits_per_block"] = " ".join(map(str, row.bits_per_block))
            writer.writerow([name, *("" if value is None else value for value in values.values())])
    return text.getvalue()
