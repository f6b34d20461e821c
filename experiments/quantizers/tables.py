"""The tables and the picture of this folder's README, from the rows of a comparison.

python -m experiments.quantizers.tables experiments/quantizers/measured/rows.jsonl --original 26.75
"""

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from statistics import mean

from experiments.quantizers.compare import Measured, rows_of
from lq.runs.figures.style import MUTED, cycled, matplotlib_figure

ABSMAX = "rtn absmax"  # what the others are measured against


@dataclasses.dataclass(frozen=True)
class Line:
    """The seeds of one method at one width and group size."""

    method: str
    rotated: bool
    bits: int
    group_size: int
    rows: tuple[Measured, ...]

    @property
    def label(self) -> str:
        return f"{self.method}, rotated" if self.rotated else self.method

    @property
    def bpw(self) -> float:
        return self.rows[0].bpw

    @property
    def perplexity(self) -> float:
        return mean(row.perplexity for row in self.rows)

    def spread(self) -> tuple[float, float]:
        """Least and greatest perplexity over the seeds."""
        values = [row.perplexity for row in self.rows]
        return min(values), max(values)


def lines(rows: list[Measured]) -> list[Line]:
    """One for every method, rotation, width and group size."""
    found = defaultdict(list)
    for row in rows:
        found[row.method, row.rotated, row.bits, row.group_size].append(row)
    return [Line(*key, rows=tuple(same)) for key, same in found.items()]


def table(found: list[Line], bits: int, group_size: int, original: float) -> str:
    """Markdown, best first. "of absmax" is the rise of perplexity over that of absmax rounding, unrotated."""
    chosen = [line for line in found if (line.bits, line.group_size) == (bits, group_size)]
    absmax = next((line for line in chosen if line.method == ABSMAX and not line.rotated), None)
    header = "| method | bits per weight | perplexity | seeds | of absmax | KL | top-1 | seconds |"
    out = [header, "|" + " --- |" * 8]
    for line in sorted(chosen, key=lambda line: line.perplexity):
        low, high = line.spread()
        share = "" if absmax is None else f"{(line.perplexity - original) / (absmax.perplexity - original):.2f}"
        cells = [
            line.label,
            f"{line.bpw:.4f}",
            f"{line.perplexity:.3f}",
            f"{low:.3f} to {high:.3f}" if len(line.rows) > 1 else "",
            share,
            f"{mean(row.kl for row in line.rows):.4f}",
            f"{100 * mean(row.top1 for row in line.rows):.1f} %",
            f"{mean(row.quantize_seconds for row in line.rows):.0f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def draw(found: list[Line], original: float, out: Path) -> None:
    """The rise of perplexity against bits per weight; rotated dashed and hollow."""
    with matplotlib_figure() as figure_class:
        figure = figure_class(figsize=(7.2, 4.6))
        axes = figure.subplots()
        methods = list(dict.fromkeys(line.method for line in found))
        for index, method in enumerate(methods):
            for rotated in (False, True):
                mine = [line for line in found if line.method == method and line.rotated == rotated]
                mine.sort(key=lambda line: line.bpw)
                if not mine:
                    continue
                look = dataclasses.replace(cycled(index), reversed=rotated).line
                rise = [line.perplexity - original for line in mine]
                label = None if rotated else method
                axes.plot([line.bpw for line in mine], rise, label=label, lw=1.0, **look)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight")
        axes.set_ylabel(f"perplexity above the original's {original:.2f}")
        axes.legend(ncols=2)
        axes.annotate("dashed: rotated", (0.99, 0.02), xycoords="axes fraction", ha="right", color=MUTED)
        figure.savefig(out, dpi=160, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--original", type=float, required=True, help="perplexity of the original on the same text")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = lines(rows_of(arguments.rows))
    for bits, group_size in sorted({(line.bits, line.group_size) for line in found}):
        print(f"\n{bits} bits, groups of {group_size}:\n\n{table(found, bits, group_size, arguments.original)}")
    if arguments.picture is not None:
        draw(found, arguments.original, arguments.picture)


if __name__ == "__main__":
    main()
