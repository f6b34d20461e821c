"""Quality against size: every order with its baselines, the sweep block by block, and several runs in one picture."""

import math
from collections.abc import Sequence
from typing import Any

from lq.runs.figures.style import DOTTED, INK, MUTED, PAPER, Style, cycled, short
from lq.runs.results import Group, Results
from lq.runs.summary import Line, format_tick, original, plan_curves, sections, sweep_curves

CEILING = 100  # times the lowest perplexity: a collapsed model above it would press all others flat against the axis
LABELS = {"perplexity": "perplexity", "kl": "KL from the original, nats", "ratio": "perplexity / original"}


def draw_curve(figure, results: Results, styles: dict[str, Style], measure: str, title: str | None = None) -> None:
    """Perplexity or KL against bits per weight, for every order and the baselines."""
    axes = figure.subplots()
    base = original(results)
    if base is not None and measure == "perplexity" and not math.isnan(_drawable(base.perplexity)):
        axes.axhline(base.perplexity, color=INK, linewidth=0.9, linestyle=DOTTED, label="original")
    plot = _Plot(axes, measure)
    baseline = {"color": INK, "markersize": 4, "zorder": 2.5}
    plot.add(_shown(results, "uniform"), "uniform", marker="s", linewidth=0.9, **baseline)
    hollow = {"marker": "D", "markerfacecolor": PAPER, "linestyle": "none"}
    plot.add(_shown(results, "finer_groups"), "finer groups", **hollow, **baseline)
    for order, lines in plan_curves(results).items():
        plot.add(lines, order, **styles[order].line)
    axes.set_xlim(*shown_sizes(results))
    axes.set_xlabel("bits per weight, scales included")
    plot.finish(figure, title)


def draw_sweep(figure, results: Results, styles: dict[str, Style], measure: str) -> None:
    """Perplexity or KL while the blocks are lowered one by one, each order by its own list."""
    axes = figure.subplots()
    plot = _Plot(axes, measure)
    curves = sweep_curves(results)
    for order, points in curves.items():
        counts, lines = zip(*points, strict=True)
        plot.add(lines, order, counts, **{**styles[order].line, "markersize": 3.2})
    axes.set_xlabel("blocks lowered")
    axes.xaxis.get_major_locator().set_params(integer=True)
    sizes = sorted({count: line.code_bits for points in curves.values() for count, line in points}.items())
    if len(sizes) > 1:
        first, last = sizes[0][0], sizes[-1][0]
        axes.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
        shown = [sizes[round(i * (len(sizes) - 1) / 4)] for i in range(5)] if len(sizes) > 5 else sizes
        top = axes.secondary_xaxis("top")
        top.set_xticks([count for count, _ in shown], [f"{bits:.2f}" for _, bits in shown])
        top.set_xlabel("code bits")
        top.spines["top"].set_visible(True)
    plot.finish(figure)


def draw_comparison(figure, runs: Sequence[tuple[str, Results]], measure: str) -> None:
    """The best plan of every budget of several runs: KL, or perplexity divided by each run's own original."""
    axes = figure.subplots()
    plot = _Plot(axes, measure)
    for index, (name, results) in enumerate(runs):
        base = original(results)
        if base is None or not base.perplexity:
            continue
        divisor = base.perplexity if measure == "ratio" else 1.0
        look = cycled(index).line
        best = [line for section in sections(results) for line in section.lines if line.best]
        plot.add(best, name, divisor=divisor, **look)
        dotted: dict[str, Any] = {"linestyle": DOTTED, "marker": "s", "markersize": 3, "linewidth": 1, "zorder": 1.9}
        plot.add(_shown(results, "uniform"), f"{name}, uniform", divisor=divisor, **{**look, **dotted})
    if measure == "ratio":
        axes.axhline(1, color=INK, linewidth=0.9, linestyle=DOTTED)
    limits = [shown_sizes(results) for _, results in runs]
    axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    axes.set_xlabel("bits per weight, scales included")
    plot.finish(figure)


def shown_sizes(results: Results) -> tuple[float, float]:
    """The range of bpw worth drawing: the plans, out to the neighbouring uniform models on both sides."""
    uniform = [row.bpw for row in results.rows if row.group == "uniform"]
    sizes = [row.bpw for row in results.rows if row.group == "plan"]
    sizes = sizes or uniform or [row.bpw for row in results.rows] or [0.0]
    low = max((bpw for bpw in uniform if bpw <= min(sizes)), default=min(sizes))
    high = min((bpw for bpw in uniform if bpw >= max(sizes)), default=max(sizes))
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _shown(results: Results, group: Group) -> list[Line]:
    """The baselines in the shown range; those outside would stretch the other axis for nothing."""
    low, high = shown_sizes(results)
    lines = [line for section in sections(results) if section.group == group for line in section.lines]
    return [line for line in lines if low <= line.bpw <= high]


class _Plot:
    """Curves over one pair of axes: bands over seeds, log where needed, what is off the scale at the top edge."""

    def __init__(self, axes, measure: str) -> None:
        self.axes, self.measure = axes, measure
        self.field = "perplexity" if measure == "ratio" else measure
        self.points: list[tuple[float, float, str]] = []  # x, y, colour

    def add(
        self,
        lines: Sequence[Line],
        label: str,
        xs: Sequence[float] | None = None,  # their sizes when None
        divisor: float = 1.0,
        **style,
    ) -> None:
        """One curve. Lines that lack the measure are left out."""
        places = [line.bpw for line in lines] if xs is None else xs
        values = [(at, line, line.mean(self.field)) for at, line in zip(places, lines, strict=True)]
        kept = [(at, line, _drawable(value / divisor)) for at, line, value in values if value is not None]
        if not kept:
            return
        xs, ys = [at for at, _, _ in kept], [y for _, _, y in kept]
        self.points += [(at, y, style["color"]) for at, y in zip(xs, ys, strict=True)]
        self.axes.plot(xs, ys, label=short(label), **style)
        if any(len(line.rows) > 1 for _, line, _ in kept):
            lows, highs = zip(*(map(_drawable, line.spread(self.field)) for _, line, _ in kept), strict=True)
            self.axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.16, linewidth=0)
            self.axes.vlines(xs, lows, highs, color=style["color"], linewidth=0.9)  # one budget alone has no area

    def finish(self, figure, title: str | None = None) -> None:
        """Scale and labels, and a legend below the axes, where it covers nothing."""
        axes = self.axes
        positive = [y for _, y, _ in self.points if y > 0]  # false for NaN
        low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
        ceiling = math.inf if self.measure == "kl" else CEILING * low
        if high > 10 * low:
            axes.set_yscale("log")
            _label_decades(axes.yaxis, min(high, ceiling) / low)
        if high > ceiling:
            axes.set_ylim(axes.dataLim.minposy / 1.3, ceiling)
        lost = [(x, colour) for x, y, colour in self.points if not y <= ceiling]
        for x, colour in lost:
            at_top = axes.get_xaxis_transform()
            axes.plot([x], [1.0], "^", transform=at_top, color=colour, markersize=6, clip_on=False, zorder=5)
        if lost:
            axes.plot([], [], "^", color=MUTED, linestyle="none", label="off the scale")
        axes.set_ylabel(LABELS[self.measure])
        if title:
            axes.set_title(short(title, 60), fontsize=9.5, loc="left")
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            longest = max(map(len, labels))
            columns = 3 if longest <= 13 else 2 if longest <= 22 else 1
            figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
            rows = math.ceil(len(labels) / columns)
            if rows > 3 and hasattr(figure, "set_figheight"):  # a whole figure: the legend shall not eat the axes
                figure.set_figheight(figure.get_figheight() + 0.18 * (rows - 3))


def _drawable(value: float) -> float:
    """NaN, where matplotlib leaves a gap, for what no axis can hold."""
    return value if abs(value) < 1e100 else math.nan


def _label_decades(axis, span: float) -> None:
    """Plain numbers on a log axis; between the powers of ten too while there are few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1000 else (1,), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
