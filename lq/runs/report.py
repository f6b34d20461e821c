"""The report of one run or several: `report.html` to read, `report.png` for a README, `results.csv` to compute with.

The page is one file: style and figures are inside, there are no scripts, and nothing is loaded from anywhere. Equal
results give equal bytes.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from lq.atomic import write_file
from lq.errors import UserError
from lq.runs import figures
from lq.runs.figures.blocks import draw_bits, has_bits, height
from lq.runs.figures.curves import draw_comparison, draw_curve, draw_sweep, shown_sizes
from lq.runs.figures.style import CURVE_HEIGHT, Style, order_styles
from lq.runs.page import page
from lq.runs.results import Results, Row
from lq.runs.summary import (
    REVERSED,
    Line,
    Section,
    budget,
    format_bytes,
    format_number,
    orders,
    original,
    plan_curves,
    sections,
    sweep_curves,
)
from lq.runs.tables import Column, base_perplexity, csv_text, filled_columns

_KL_CAPTION = "The same for the KL divergence from the original, per token."


def write_report(results: Sequence[tuple[str, Results]], out_dir: Path) -> Path:
    """Writes the three files into `out_dir`, each whole or not at all, and returns the path of the page.

    Args:
        results: (name, results) per run, in the order in which they are to be shown. Names tell the runs apart: the
            directories they were read from, for example.
        out_dir: created when it is missing. Files of an earlier report are replaced.
    """
    results = list(results)
    if not results:
        raise UserError("a report needs at least one run; give the directory of one: lq report RUN")
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file; give a directory for the report")
    files = {  # the page last: when it is there, the others are
        "results.csv": csv_text(results).encode(),
        "report.png": figures.png(results),
        "report.html": html(results).encode(),
    }
    for name, data in files.items():
        write_file(out_dir / name, functools.partial(_fill, data=data))
    return out_dir / "report.html"


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def html(results: Sequence[tuple[str, Results]]) -> str:
    """The page, as text."""
    styles = order_styles(*(run for _, run in results))
    number = itertools.count(1)

    def figure(draw: Callable, height: float, caption: str) -> str:
        drawing = figures.svg(draw, height, f"f{next(number)}")
        described = drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
        return f"<figure>{described}<figcaption>{escape(caption)}</figcaption></figure>"

    if len(results) == 1:
        return page(results[0][1].title, _run(results[0][1], styles, figure, "h1"))
    parts = [_comparison(results, figure)]
    parts += [_run(run, styles, figure, "h2", name) for name, run in results]
    return page(f"{len(results)} runs compared", "\n".join(f"<section>{part}</section>" for part in parts))


def _run(run: Results, styles: dict[str, Style], figure: Callable, level: str, name: str | None = None) -> str:
    title = run.title if name is None or name == run.title else f"{name}: {run.title}"
    parts = [f"<{level}>{escape(title)}</{level}>"]
    if run.conclusion:
        parts.append(f'<p class="lead">{escape(run.conclusion)}</p>')
    facts = {"Model": run.model, "Protocol": run.protocol, "Quantizer": run.quantizer, "Environment": run.environment}
    parts.append("<dl>" + "".join(_facts(heading, data) for heading, data in facts.items() if data) + "</dl>")
    parts.append("<h3>Measurements</h3>" + _table(run, sections(run), styles) + _notes(run))
    singles = _singles(run)
    if singles:
        count = sum(len(section.lines) for section in singles)
        parts.append(f"<details><summary>Single measurements ({count})</summary>")
        parts.append(_table(run, singles, styles) + "</details>")
    return "\n".join(parts + _figures(run, styles, figure))


def _figures(run: Results, styles: dict[str, Style], figure: Callable) -> list[str]:
    """The figures that the rows of the run allow, each group under its heading."""
    measures = {"perplexity": "Perplexity", "kl": "KL divergence"} if _has_kl(run) else {"perplexity": "Perplexity"}
    parts = []
    curves = []
    if any(row.group not in ("original", "move") for row in run.rows):
        for measure, word in measures.items():
            draw = functools.partial(draw_curve, results=run, styles=styles, measure=measure)
            caption = f"{word} against size. {_curve_caption(run)}" if measure == "perplexity" else _KL_CAPTION
            curves.append(figure(draw, CURVE_HEIGHT, caption))
    bits = []
    if has_bits(run):
        draw = functools.partial(draw_bits, results=run, styles=styles)
        bits.append(figure(draw, height(run), _bits_caption(run)))
    if curves:
        columns = f"<div>{''.join(curves)}</div><div>{''.join(bits)}</div>" if bits else "".join(curves)
        parts.append(f'<h3>Quality and bits</h3><div class="figures">{columns}</div>')
    if sweep_curves(run):
        parts.append('<h3>Blocks lowered one by one</h3><div class="figures">')
        for measure, word in measures.items():
            draw = functools.partial(draw_sweep, results=run, styles=styles, measure=measure)
            caption = f"{word} while the blocks are lowered one after the other, least important first."
            parts.append(figure(draw, CURVE_HEIGHT, caption))
        parts.append("</div>")
    return parts


def _curve_caption(run: Results) -> str:
    says = []
    base = original(run)
    if base:
        says.append(f"Dotted: the original, {format_number(base.perplexity)}.")
    seeds = max((len(line.rows) for lines in plan_curves(run).values() for line in lines), default=1)
    if seeds > 1:
        says.append(f"Grey: mean of {seeds} random orders, from the lowest to the highest.")
    if any(order.startswith(REVERSED) for order in plan_curves(run)):
        says.append("Dashed: reversed orders.")
    low, high = shown_sizes(run)
    if any(not low <= row.bpw <= high for row in run.rows if row.group in ("uniform", "finer_groups")):
        says.append("Uniform models far from the budgets are in the table only.")
    return " ".join(says)


def _bits_caption(run: Results) -> str:
    scores = "The"
    if run.scores:
        scores = "Scores of every block (each on its own scale, larger deserves more bits), and below them the"
    return f"{scores} bits that each plan gives it. Blocks run from the embedding on the left to the output."


def _table(run: Results, groups: Iterable[Section], styles: dict[str, Style]) -> str:
    base, columns = base_perplexity(run), filled_columns(run)
    head = "".join(
        f'<th scope="col"><abbr title="{escape(c.meaning)}">{escape(c.heading)}</abbr></th>' for c in columns
    )
    parts = [f'<div class="scroll"><table><thead><tr><th scope="col">model</th>{head}</tr></thead>']
    for group in groups:
        parts.append(
            f'<tbody><tr class="group"><th colspan="{len(columns) + 1}"><span>{escape(group.heading)}</span></th></tr>'
        )
        parts += [_line(line, base, columns, styles) for line in group.lines]
        parts.append("</tbody>")
    return "\n".join([*parts, "</table></div>"])


def _line(line: Line, base: float | None, columns: Sequence[Column], styles: dict[str, Style]) -> str:
    style = styles.get(line.order or "")
    key = ""
    if style:  # the colour the order has in the figures; hollow when reversed
        fill = "none" if style.reversed else style.colour
        key = f'<span class="key" style="border-color:{style.colour};background:{fill}"></span>'
    cells = []
    for column in columns:
        value, _, second = escape(column.show(line, base)).partition("\n")
        exact = f' title="{escape(column.exact(line))}"' if column.exact and column.exact(line) else ""
        cells.append(f"<td{exact}>{value}{f'<small>{second}</small>' if second else ''}</td>")
    label = f"{key}{escape(line.label)}{' <small>best</small>' if line.best else ''}"
    name = escape(", ".join(row.name for row in line.rows))
    return f'<tr{" class=best" if line.best else ""}><th scope="row" title="{name}">{label}</th>{"".join(cells)}</tr>'


def _notes(run: Results) -> str:
    says = ["bpw counts scales and zero points; perplexities compare at equal bpw only. MB are 10⁶ bytes."]
    if any(line.best for section in sections(run) for line in section.lines):
        says.append("Best: the lowest perplexity of its budget.")
    if any(len(line.rows) > 1 for section in sections(run) for line in section.lines):
        says.append("Random orders: mean ± sample standard deviation over the seeds, below it the range.")
    return f'<p class="note">{escape(" ".join(says))}</p>'


def _singles(run: Results) -> list[Section]:
    """What the main table does not show row by row: the seeds of random orders, and the sweep."""
    found = []
    for section in sections(run):
        rows = [row for line in section.lines if len(line.rows) > 1 for row in line.rows]
        if rows:
            lines = tuple(Line(label=row.name, rows=(row,)) for row in rows)
            found.append(Section(heading=section.heading, group=section.group, lines=lines))
    for order, points in sweep_curves(run).items():
        lines = tuple(Line(label=row.name, rows=(row,)) for _, line in points for row in line.rows)
        found.append(Section(heading=f"Blocks lowered one by one, {order}", group="move", lines=lines))
    return found


def _facts(heading: str, data: dict) -> str:
    items = "".join(f"<span><i>{escape(key)}</i> {escape(value)}</span>\n" for key, value in _flatten(data))
    return f"<dt>{escape(heading)}</dt><dd>{items}</dd>"


def _flatten(data: dict) -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        elif value is not None:
            yield _describe(str(key), value)


def _describe(key: str, value: object) -> tuple[str, str]:
    """A fact for reading: `*_seconds` become hours and minutes, `*_bytes` become MB, large counts get their commas."""
    words = key.replace("_", " ")
    if isinstance(value, bool):
        return words, "yes" if value else "no"
    if isinstance(value, list | tuple):
        return words, ", ".join(_describe("", item)[1] for item in value)
    if not isinstance(value, int | float):
        return words, str(value)
    if key.endswith("seconds"):
        return words.removesuffix("seconds") + "time", _duration(value)
    if key.endswith("bytes"):
        return words.removesuffix("bytes").strip() or "size", f"{format_bytes(value)} MB"
    if isinstance(value, int):
        return words, f"{value:,}" if abs(value) >= 10_000 else str(value)
    return words, f"{value:g}"


def _duration(seconds: float) -> str:
    if not 0 <= seconds < 1e9:
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _comparison(results: Sequence[tuple[str, Results]], figure: Callable) -> str:
    """What can be compared between runs: the best plan of every budget, as a ratio to each run's own original."""
    parts = [f"<h1>{len(results)} runs compared</h1>"]
    protocols = [run.protocol for _, run in results]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    differing = [key for key in keys if any(protocol.get(key) != protocols[0].get(key) for protocol in protocols)]
    if differing:
        what = ", ".join(map(str, differing))
        parts.append(f'<p class="lead">The protocols differ ({escape(what)}): compare ratios, not perplexities.</p>')
    head = "".join(f'<th scope="col">{h}</th>' for h in ("best order", "bpw", "perplexity", "ratio", "KL", "original"))
    parts.append(f'<div class="scroll"><table><thead><tr><th scope="col">budget</th>{head}</tr></thead>')
    for name, run in results:
        best = [line for section in sections(run) for line in section.lines if line.best]
        parts.append(f'<tbody><tr class="group"><th colspan="7"><span>{escape(name)}</span></th></tr>')
        parts += [_best_line(line, original(run)) for line in best]
        parts.append("</tbody>")
    parts.append("</table></div>")
    if any(orders(run) and original(run) for _, run in results):
        parts.append('<h3>Quality against size</h3><div class="figures">')
        caption = "Perplexity over that of the original. Solid: the best plan of each budget. Dotted: uniform models."
        draw = functools.partial(draw_comparison, runs=results, measure="ratio")
        parts.append(figure(draw, CURVE_HEIGHT, caption))
        if any(_has_kl(run) for _, run in results):
            draw = functools.partial(draw_comparison, runs=results, measure="kl")
            parts.append(figure(draw, CURVE_HEIGHT, _KL_CAPTION))
        parts.append("</div>")
    return "\n".join(parts)


def _best_line(line: Line, base: Row | None) -> str:
    cells = [
        line.label,
        f"{line.bpw:.3f}",
        format_number(line.perplexity),
        format_number(line.perplexity / base.perplexity if base and base.perplexity else None),
        format_number(line.mean("kl")),
        format_number(base.perplexity if base else None),
    ]
    target = f"{budget(line.rows[0]):g} bpw"
    return f'<tr><th scope="row">{target}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _has_kl(run: Results) -> bool:
    return any(row.kl is not None for row in run.rows if row.group != "original")
