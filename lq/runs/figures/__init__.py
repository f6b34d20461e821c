"""The figures of a run: quality against bits per weight, the sweep block by block, and which block got which bits.

One drawing serves two outputs: an SVG to be put inline in a page, whose neutral colours are CSS variables of that page
(`--ink`, `--muted`, `--grid`, `--paper`), and a PNG on white. Equal results give equal bytes.
"""

import io
import re
from collections.abc import Callable, Sequence

from lq.runs.figures.blocks import draw_bits, has_bits, height
from lq.runs.figures.curves import draw_curve
from lq.runs.figures.style import CURVE_HEIGHT, PAPER, VARIABLES, WIDTH, matplotlib_figure, order_styles
from lq.runs.results import Results


def svg(draw: Callable, inches: float, name: str) -> str:
    """What `draw(figure)` draws, as an `<svg>` element.

    Args:
        draw: fills an empty matplotlib figure.
        inches: height of the figure, unless `draw` changes it; the width is the same for all. The page chooses the
            size it is shown at.
        name: prefix of the element's ids, which must be unique in a page.
    """
    with matplotlib_figure() as Figure:
        figure = Figure(figsize=(WIDTH, inches))
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'\s(width|height)="[^"]*pt"', "", text, count=2)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def png(runs: Sequence[tuple[str, Results]]) -> bytes:
    """The picture for a README: for each run the curve of perplexity and, beside it, the bits of every block."""
    styles = order_styles(*(results for _, results in runs))
    heights = [max(CURVE_HEIGHT, height(results)) for _, results in runs]
    with matplotlib_figure() as Figure:
        figure = Figure(figsize=(2 * WIDTH, sum(heights)), facecolor=PAPER)
        strips = figure.subfigures(len(runs), 1, height_ratios=heights, squeeze=False)[:, 0]
        for strip, (name, results) in zip(strips, runs, strict=True):
            panels = strip.subfigures(1, 2, wspace=0.04) if has_bits(results) else [strip]
            draw_curve(panels[0], results, styles, "perplexity", title=name if len(runs) > 1 else None)
            if has_bits(results):
                draw_bits(panels[1], results, styles)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=180, metadata={"Software": None})
    return file.getvalue()
