"""What every figure shares: size, colours, one look per order, and matplotlib without anybody's settings.

Orders keep one colour and one marker in every figure; a reversed order has those of the order it reverses, dashed and
hollow. The colours are Paul Tol's *vibrant* set, which stays distinguishable with the common colour blindnesses, on
light and on dark. matplotlib is imported where it draws, so that importing this module stays cheap.

References: Paul Tol, "Colour Schemes", SRON/EPS/TN/09-002, 2021.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from lq.runs.results import Results
from lq.runs.summary import RANDOM, REVERSED, orders

INK, MUTED, GRID, PAPER = "#1d2126", "#686e76", "#e1e4e8", "#fefefe"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}  # in a page

WIDTH = 4.3  # inches: 310 points, so that 9-point text has more than 9 pixels on a phone
CURVE_HEIGHT = 3.5

COLOURS = ("#0077bb", "#ee7733", "#009988", "#ee3377", "#33bbee", "#cc3311")  # blue, orange, teal, magenta, cyan, red
MARKERS = "o^vDPX<>"
DOTTED = (0, (1, 1.6))
_KNOWN = ("lim", "zd", "first_last")  # the paper's orders look the same in every report

_SETTINGS = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same everywhere
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be searched and takes the page's font
    "svg.hashsalt": "lq",  # ids are hashes of the content, not random
}


@dataclasses.dataclass(frozen=True)
class Style:
    """How an order looks wherever it appears."""

    colour: str
    marker: str
    reversed: bool = False

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of a matplotlib line."""
        face = PAPER if self.reversed else self.colour
        dashes = "--" if self.reversed else "-"
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "linestyle": dashes}


def order_styles(*runs: Results) -> dict[str, Style]:
    """Order or metric -> its look, the same over all `runs`."""
    names = [*orders(*runs), *(metric for results in runs for metric in results.scores)]
    bases = dict.fromkeys([*_KNOWN, *(name.removeprefix(REVERSED) for name in names)])
    bases.pop(RANDOM, None)
    look = {name: cycled(index) for index, name in enumerate(bases)} | {RANDOM: Style(MUTED, "")}
    return {
        name: dataclasses.replace(look[name.removeprefix(REVERSED)], reversed=name.startswith(REVERSED))
        for name in names
    }


def cycled(index: int) -> Style:
    """The look of the `index`-th of any number of things; 24 of them before one repeats."""
    return Style(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])


def short(text: str, limit: int = 34) -> str:
    """`text`, cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def matplotlib_figure() -> Iterator[type]:
    """The Figure class under our settings alone: no pyplot, no window system, nothing of the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield Figure
