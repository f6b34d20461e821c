"""The tables and the picture of this folder's README, from the rows of a comparison.

python -m experiments.quantizers.tables experiments/quantizers/measured/rows.jsonl --original 26.75
"""

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from statistics import mean

from experiments.quantizers.compare import Measured
from experiments.rows import markdown, rows_of
from lq.runs.figures.style import cycled, matplotlib_figure

ABSMAX, SIGNED = "rtn absmax", "rtn absmax signed"  # what the others are measured against
BASE = "gptq"  # and whose KL theirs is divided by


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

    @property
    def kl(self) -> float:
        return mean(row.kl for row in self.rows)

    def spread(self) -> tuple[float, float]:
        """Least and greatest perplexity over the seeds."""
        values = [row.perplexity for row in self.rows]
        return min(values), max(values)

    def kl_spread(self) -> float:
        """The distance of the least and the greatest KL of the seeds, over their mean."""
        values = [row.kl for row in self.rows]
        return (max(values) - min(values)) / mean(values)


def lines(rows: list[Measured]) -> list[Line]:
    """One for every method, rotation, width and group size."""
    found = defaultdict(list)
    for row in rows:
        found[row.method, row.rotated, row.bits, row.group_size].append(row)
    order = list(dict.fromkeys(row.method for row in rows))
    return [Line(*key, rows=tuple(found[key])) for key in sorted(found, key=lambda key: order.index(key[0]))]


def table(found: list[Line], bits: int, group_size: int, original: float) -> str:
    """Markdown, best first. "of absmax" is the rise of perplexity over that of absmax rounding, unrotated."""
    chosen = [line for line in found if (line.bits, line.group_size) == (bits, group_size)]
    bases = [next((x for x in chosen if x.method == name and not x.rotated), None) for name in (ABSMAX, SIGNED)]

    def share(line: Line, base: Line | None) -> str:
        return "" if base is None else f"{(line.perplexity - original) / (base.perplexity - original):.2f}"

    out = []
    for line in sorted(chosen, key=lambda line: line.perplexity):
        low, high = line.spread()
        cells = [
            line.label,
            f"{line.bpw:.4f}",
            f"{line.perplexity:.3f}",
            f"{low:.3f} to {high:.3f}" if len(line.rows) > 1 else "",
            *(share(line, base) for base in bases),
            f"{line.kl:.4f}",
            f"{100 * mean(row.top1 for row in line.rows):.1f} %",
            f"{mean(row.quantize_seconds for row in line.rows):.0f}",
        ]
        out.append(cells)
    names = "method", "bits per weight", "perplexity", "seeds", "of absmax", "of signed", "KL", "top-1", "seconds"
    return markdown(names, out)


def ratios(found: list[Line]) -> str:
    """Markdown: KL over GPTQ's at the same width and group size, not rotated; in brackets, of how many seeds."""
    places = sorted({(line.bits, line.group_size) for line in found})
    base = {(line.bits, line.group_size): line.kl for line in found if line.method == BASE and not line.rotated}
    out = []
    for label, mine in _by_label(found).items():
        cells = [mine.get(place) for place in places]
        shown = [
            "" if line is None or place not in base else f"{line.kl / base[place]:.2f} ({len(line.rows)})"
            for place, line in zip(places, cells, strict=True)
        ]
        out.append([label, *shown])
    return markdown(["method", *(f"{bits} bits, {size}" for bits, size in places)], out)


def noise(found: list[Line]) -> str:
    """Markdown: how far the seeds lie apart at most, at each width: KL as a share of it, and perplexity."""
    widths = sorted({line.bits for line in found})
    out = []
    for label, mine in _by_label(found).items():
        several = [line for line in mine.values() if len(line.rows) > 1]
        if not several:
            continue
        cells = [label, str(max(len(line.rows) for line in several))]
        for bits in widths:
            of_width = [line for line in several if line.bits == bits]
            kl = max((line.kl_spread() for line in of_width), default=None)
            perplexity = max((line.spread()[1] - line.spread()[0] for line in of_width), default=None)
            cells += ["" if kl is None else f"{100 * kl:.0f} %", "" if perplexity is None else f"{perplexity:.2f}"]
        out.append(cells)
    names = [f"{bits} bits, {what}" for bits in widths for what in ("KL", "perplexity")]
    return markdown(["method", "seeds", *names], out)


def _by_label(found: list[Line]) -> dict[str, dict[tuple[int, int], Line]]:
    """Label -> width and group size -> line."""
    by_label = defaultdict(dict)
    for line in found:
        by_label[line.label][line.bits, line.group_size] = line
    return by_label


def draw(found: list[Line], out: Path) -> None:
    """KL divergence to the original against bits per weight, as it is and rotated."""
    with matplotlib_figure() as figure_class:
        figure = figure_class(figsize=(9.6, 4.6))
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        methods = list(dict.fromkeys(line.method for line in found))
        for axes, rotated in zip(panels, (False, True), strict=True):
            for index, method in enumerate(methods):
                mine = sorted((x for x in found if (x.method, x.rotated) == (method, rotated)), key=lambda x: x.bpw)
                if mine:
                    axes.plot([x.bpw for x in mine], [x.kl for x in mine], label=method, lw=1.0, **cycled(index).line)
            axes.set_title("rotated" if rotated else "not rotated")
            axes.set_xlabel("bits per weight")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        panels[0].set_ylabel("KL divergence to the original")
        panels[1].legend(*panels[0].get_legend_handles_labels(), ncols=2)
        figure.savefig(out, dpi=160, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--original", type=float, required=True, help="perplexity of the original on the same text")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = lines(rows_of(arguments.rows, Measured))
    print(f"### KL over GPTQ's\n\n{ratios(found)}\n\n### How far seeds lie apart\n\n{noise(found)}")
    for bits, group_size in sorted({(line.bits, line.group_size) for line in found}):
        print(f"\n### {bits} bits, groups of {group_size}\n\n{table(found, bits, group_size, arguments.original)}")
    if arguments.picture is not None:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
