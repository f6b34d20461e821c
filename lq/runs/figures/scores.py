"""Scores of every block, one panel per metric: the picture `lq score` writes."""

import io
from collections.abc import Mapping
from pathlib import Path

from lq.atomic import write_file
from lq.importance.scores import Scores
from lq.runs.figures.style import PAPER, WIDTH, cycled, matplotlib_figure

PANEL = 1.5  # inches


def write_scores_figure(scores: Mapping[str, Scores], path: Path) -> None:
    """A PNG with the value of every unit, first to last, larger = deserves more bits."""
    with matplotlib_figure() as Figure:
        figure = Figure(figsize=(1.5 * WIDTH, 0.5 + PANEL * len(scores)), facecolor=PAPER)
        alike = len({len(found.values) for found in scores.values()}) == 1
        panels = figure.subplots(len(scores), 1, sharex=alike, squeeze=False)[:, 0]
        for index, (panel, (metric, found)) in enumerate(zip(panels, scores.items(), strict=True)):
            look, values = cycled(index), list(found.values.values())
            panel.plot(range(len(values)), values, color=look.colour, marker=look.marker if len(values) <= 80 else "")
            panel.set_title(metric, loc="left", fontsize=9)
            panel.margins(y=0.15)
            blocks = not any("/" in unit for unit in found.values)
            if not alike or index == len(scores) - 1:
                panel.set_xlabel("block" if blocks else "unit, first block first")
            panel.xaxis.get_major_locator().set_params(integer=True)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    write_file(path, lambda temporary: temporary.write_bytes(file.getvalue()))
