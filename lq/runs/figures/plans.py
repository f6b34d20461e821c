"""Pictures of an allocation: which matrix got which bits, and whether a score foresaw what rounding does."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lq.allocation.plan import Plan
from lq.atomic import write_file
from lq.errors import UserError
from lq.importance.agreement import spearman
from lq.importance.scores import Scores
from lq.models.matrices import block_of
from lq.runs.figures.style import GRID, INK, MUTED, PAPER, WIDTH, cycled, matplotlib_figure

DENSE = 16.0
_ROW = 0.22  # inches


def write_plan_figure(plan: Plan, path: Path) -> None:
    """A PNG with the mean width of every block matrix's codes: a row for each type of matrix, blocks left to right.

    What stays dense is grey. Numbers are written into the cells of up to 48 blocks.
    """
    names, bits = matrix_bits(plan)
    with matplotlib_figure() as Figure:
        figure = Figure(figsize=(max(WIDTH, 1.6 + 0.3 * bits.shape[1]), 1.0 + _ROW * len(names)), facecolor=PAPER)
        axes = figure.subplots()
        shown = np.ma.masked_where(~(bits < DENSE), bits)
        image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=np.floor(shown.min()), vmax=np.ceil(shown.max()))
        axes.set_facecolor(GRID)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False)
        if bits.shape[1] <= 48:
            _write_numbers(axes, shown, image)
        figure.colorbar(image, ax=axes, label="bits a code", fraction=0.05, pad=0.02)
        axes.set_title(f"{plan.bpw:.3f} bits per weight", loc="left", fontsize=9)
        _save(figure, path)


def write_damage_figure(scores: Mapping[str, Scores], measured: Scores, path: Path) -> None:
    """A PNG with each of `scores` against what rounding every unit was measured to lose, and their rank correlation.

    Args:
      scores: by name; a panel each, of the units that it shares with `measured`.
      measured: scores whose values are losses, such as those of `kl`.
      path: of the picture.

    Raises:
      UserError: a score that shares fewer than three units with what was measured.
    """
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    with matplotlib_figure() as Figure:
        figure = Figure(figsize=(2.9 * columns, 2.6 * rows), facecolor=PAPER)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for index, (axes, (name, found)) in enumerate(zip(panels, scores.items(), strict=False)):
            units = [unit for unit in measured.values if unit in found.values]
            if len(units) < 3:
                raise UserError(f"{name}: {len(units)} units in common with {measured.metric}; score the same units")
            value, damage = (np.array([s.values[unit] for unit in units]) for s in (found, measured))
            axes.plot(value, damage, linestyle="", color=cycled(index).colour, marker="o", markersize=2.5)
            axes.set_title(f"{name}\nrank correlation {float(spearman(value, damage)):.2f}", loc="left", fontsize=8.5)
            axes.locator_params(axis="x", nbins=4)
        if all(loss > 0 for loss in measured.values.values()):  # of shared axes: one scale is all panels'
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_formatter("{x:g}")  # plain: mathematics is not typeset, see the style
        for axes in panels[len(scores) :]:
            axes.set_visible(False)
        figure.supylabel("measured damage", fontsize=9, color=INK)
        figure.supxlabel("score", fontsize=9, color=INK)
        _save(figure, path)


def matrix_bits(plan: Plan) -> tuple[list[str], np.ndarray]:
    """The types of block matrices, by path within a block, and the mean width of their codes `[types, blocks]`.

    16 where a matrix is dense, NaN where a block has none of the type.
    """
    paths = [path for path in plan.shapes if block_of(path) is not None]
    names = list(dict.fromkeys(path.split("/", 1)[1] for path in paths))
    bits = np.full((len(names), 1 + max(block_of(path) or 0 for path in paths)), np.nan)
    for path in paths:
        spec = plan.specs.get(path)
        bits[names.index(path.split("/", 1)[1]), block_of(path)] = DENSE if spec is None else spec.code_bits
    return names, bits


def _write_numbers(axes, bits: np.ma.MaskedArray, image) -> None:
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), width in np.ndenumerate(bits):
        if bits.mask is not np.ma.nomask and bits.mask[row, column]:
            axes.text(column, row, "·", ha="center", va="center", color=MUTED)
        else:
            text, colour = f"{width:.2g}", INK if width > middle else PAPER
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def _save(figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    write_file(path, lambda temporary: temporary.write_bytes(file.getvalue()))
