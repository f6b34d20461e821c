"""Which block got which bits, and the scores that decided it: one row of cells per plan, blocks from left to right."""

import itertools
import math
from collections.abc import Callable, Sequence

from lq.runs.figures.style import PAPER, Style, short
from lq.runs.results import Results, Row
from lq.runs.summary import budget, order_of, orders

_SCORE, _ROW = 0.5, 0.165  # inches

# (label, height in rows, bits per block); a heading has no bits
_Cells = tuple[str, float, tuple[float, ...]]


def has_bits(results: Results) -> bool:
    """Whether there is a plan whose blocks can be pictured."""
    return any(row.group == "plan" and row.bits_per_block for row in results.rows)


def height(results: Results) -> float:
    """Inches that `draw_bits` needs."""
    return 1.15 + _SCORE * len(_scores(results)) + _ROW * sum(rows for _, rows, _ in _cells(results))


def draw_bits(figure, results: Results, styles: dict[str, Style]) -> None:
    """Cells coloured by bits, budget by budget; above them the scores, each on its own scale."""
    scores, cells = _scores(results), _cells(results)
    heights = [_SCORE] * len(scores) + [_ROW * sum(rows for _, rows, _ in cells)]
    *panels, axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (metric, values) in zip(panels, scores.items(), strict=True):
        look = styles[metric]
        marker = look.marker if len(values) <= 40 else ""
        panel.plot(range(len(values)), values, color=look.colour, marker=marker, markersize=3, linewidth=1.1)
        panel.set_ylabel(f"{short(metric, 16)} ", rotation=0, ha="right", va="center")
        panel.set_yticks([])
        panel.margins(y=0.18)
        panel.tick_params(bottom=False)
        panel.spines[["left", "bottom"]].set_visible(False)
    widths = sorted({width for _, _, bits in cells for width in bits})
    colour = _colours(widths[0], widths[-1])
    _draw_cells(axes, cells, colour)
    axes.set_xlabel("block")
    _legend(figure, widths, colour)


def _draw_cells(axes, cells: Sequence[_Cells], colour: Callable[[float], tuple]) -> None:
    top, ticks = 0.0, []
    for label, rows, bits in cells:
        if not bits:
            axes.text(-0.5, top + rows - 0.25, label, va="bottom", ha="left", fontsize=8.5, fontweight="bold")
        else:
            # one rectangle per run of equal widths keeps the page small for models of a hundred blocks
            edges = [0, *itertools.accumulate(len(list(same)) for _, same in itertools.groupby(bits))]
            spans = [(start - 0.5, end - start) for start, end in itertools.pairwise(edges)]
            fills = [colour(bits[start]) for start in edges[:-1]]
            axes.broken_barh(spans, (top, rows * 0.9), facecolors=fills, linewidth=0)
            if label:
                ticks.append((top + rows * 0.45, label))
        top += rows
    count = max(len(bits) for _, _, bits in cells)
    axes.vlines([block + 0.5 for block in range(count - 1)], 0, top, color=PAPER, linewidth=min(1.2, 24 / count))
    axes.set_ylim(top, 0)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_yticks([at for at, _ in ticks], [short(label, 20) for _, label in ticks])
    axes.tick_params(left=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(False)


def _legend(figure, widths: Sequence[float], colour: Callable[[float], tuple]) -> None:
    """Every width when there are few, the whole ones in the range otherwise."""
    from matplotlib.patches import Patch

    named = widths if len(widths) <= 4 else range(math.floor(widths[0]), math.ceil(widths[-1]) + 1)
    swatches = [Patch(facecolor=colour(min(max(width, widths[0]), widths[-1])), linewidth=0) for width in named]
    labels = [f"{width:.3g} bits" for width in named]
    figure.legend(swatches, labels, loc="outside lower center", ncols=min(4, len(labels)), handlelength=1.2)


def _colours(low: float, high: float) -> Callable[[float], tuple]:
    """Width -> colour: light for few bits, dark for many. The ends of the map vanish on white and on black: unused."""
    import matplotlib

    shades = matplotlib.colormaps["YlGnBu"]
    return lambda width: shades(0.2 + 0.6 * ((width - low) / (high - low) if high > low else 0.5))


def _cells(results: Results) -> list[_Cells]:
    """From the top: the largest budget first, the orders always in the same order, random seeds under one label."""
    plans = [row for row in results.rows if row.group == "plan" and row.bits_per_block]
    cells: list[_Cells] = []
    for target in sorted({budget(row) for row in plans}, reverse=True):
        cells.append((f"{target:g} bits per weight", 1.6, ()))
        for order in orders(results):
            same = [row for row in plans if budget(row) == target and order_of(row) == order]
            cells += [_cell(order, row, index, len(same)) for index, row in enumerate(same)]
    return cells


def _cell(order: str, row: Row, index: int, count: int) -> _Cells:
    """Three rows of one order or more are thinner, and the middle one bears the label."""
    return order if index == count // 2 else "", 0.5 if count > 2 else 1.0, row.bits_per_block


def _scores(results: Results) -> dict[str, list[float]]:
    """The scores with at least one finite value, gaps where a value is not finite."""
    scores = {name: [v if math.isfinite(v) else math.nan for v in values] for name, values in results.scores.items()}
    return {name: values for name, values in scores.items() if not all(map(math.isnan, values))}
