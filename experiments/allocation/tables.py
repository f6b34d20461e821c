"""Tables and pictures of a comparison, from its rows; and how far scores agree, where its scores are there.

python -m experiments.allocation.tables RUN --pictures DIR
"""

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np

from experiments.allocation.compare import Measured
from experiments.rows import markdown, rows_of
from lq.importance import Scores
from lq.importance.agreement import agreement
from lq.runs.figures.plans import write_damage_figure
from lq.runs.figures.style import cycled, matplotlib_figure

MEASURED = "kl"  # the score that draws damage
# Whose KL that of others is divided by, the first that is there: exact solutions for whole matrices, on their measured
# losses, on predicted ones.
BASES = ("kl", "predicted")
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Line:
    """The seeds of one plan at one budget."""

    quantizer: str
    plan: str
    budget: float
    rows: tuple[Measured, ...]

    @property
    def kl(self) -> float:
        return mean(row.kl for row in self.rows)

    @property
    def perplexity(self) -> float:
        return mean(row.perplexity for row in self.rows)

    def spread(self) -> str:
        """Least and greatest KL over the seeds; empty for one."""
        values = [row.kl for row in self.rows]
        return f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""


def lines(rows: list[Measured]) -> list[Line]:
    """One for every quantizer, plan and budget."""
    found = defaultdict(list)
    for row in rows:
        found[row.quantizer, row.plan, row.budget].append(row)
    return [Line(*key, rows=tuple(of_key)) for key, of_key in found.items()]


def ratios(found: list[Line], quantizer: str) -> str:
    """Markdown: KL over that of `base_of` at the same budget, best first by the mean over budgets; and what it took."""
    budgets = sorted({line.budget for line in found if line.quantizer == quantizer})
    by_plan = defaultdict(dict)
    for line in found:
        if line.quantizer == quantizer:
            by_plan[line.plan][line.budget] = line
    base = by_plan.get(base_of(found, quantizer), {})
    of = lambda mine: {b: line.kl / base[b].kl for b, line in mine.items() if b in base}  # noqa: E731
    rows = []
    for plan, mine in sorted(by_plan.items(), key=lambda item: mean(of(item[1]).values() or [float("inf")])):
        shares = of(mine)
        measured = [row for line in mine.values() for row in line.rows]
        passes = max((row.passes for row in measured if row.passes is not None), default=None)
        took = max(row.seconds for row in measured)
        cells = [f"{shares[b]:.2f}" if b in shares else "" for b in budgets]
        rows.append([plan, *cells, "" if passes is None else f"{passes:.0f}", f"{took:.0f}"])
    return markdown(["plan", *(f"{budget} bpw" for budget in budgets), "forward passes", "seconds"], rows)


def base_of(found: list[Line], quantizer: str) -> str:
    """The first of `BASES` that was measured."""
    plans = {line.plan for line in found if line.quantizer == quantizer}
    return next((base for base in BASES if base in plans), BASES[0])


def table(found: list[Line], quantizer: str, budget: float) -> str:
    """Markdown: every plan at one budget, least KL first."""
    rows = []
    for line in sorted(found, key=lambda line: line.kl):
        if (line.quantizer, line.budget) == (quantizer, budget):
            row = line.rows[0]
            sizes = f"{row.bpw:.4f}", str(row.bytes_on_disk)
            top1 = f"{100 * mean(row.top1 for row in line.rows):.1f} %"
            rows.append([line.plan, *sizes, f"{line.kl:.5f}", line.spread(), f"{line.perplexity:.3f}", top1])
    return markdown(["plan", "bits per weight", "bytes on disk", "KL", "seeds", "perplexity", "top-1"], rows)


def draw(found: list[Line], path: Path) -> None:
    """KL divergence against bits per weight; a panel for each quantizer, random plans as a band."""
    quantizers = list(dict.fromkeys(line.quantizer for line in found))
    with matplotlib_figure() as figure_class:
        figure = figure_class(figsize=(6.2 * len(quantizers), 5.6))
        panels = figure.subplots(1, len(quantizers), sharey=True, squeeze=False)[0]
        plans = [plan for plan in dict.fromkeys(line.plan for line in found) if plan != RANDOM]
        for axes, quantizer in zip(panels, quantizers, strict=True):
            mine = sorted((line for line in found if line.quantizer == quantizer), key=lambda line: line.budget)
            drawn = [line for line in mine if line.plan == RANDOM]
            low, high = ([end(row.kl for row in line.rows) for line in drawn] for end in (min, max))
            axes.fill_between([line.budget for line in drawn], low, high, color="0.85", label=RANDOM)
            for index, plan in enumerate(plans):
                points = [line for line in mine if line.plan == plan]
                bpw = [mean(row.bpw for row in line.rows) for line in points]
                axes.plot(bpw, [line.kl for line in points], label=plan, lw=0.9, ms=3.5, **cycled(index).line)
            axes.set_title(quantizer)
            axes.set_xlabel("bits per weight")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        panels[0].set_ylabel("KL divergence to the original")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
        figure.savefig(path, dpi=160, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="directory of a comparison, with rows.jsonl and scores/")
    parser.add_argument("--pictures", type=Path, help="directory for pareto.png and damage-QUANTIZER.png")
    arguments = parser.parse_args()
    found = lines(rows_of(arguments.run / "rows.jsonl", Measured))
    print(page(found, arguments.run / "scores"))
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        draw(found, arguments.pictures / "pareto.png")
        for quantizer in dict.fromkeys(line.quantizer for line in found):
            draw_damage(arguments.run / "scores", quantizer, arguments.pictures / f"damage-{quantizer}.png")


def page(found: list[Line], scores: Path) -> str:
    """All tables, Markdown; the agreement of scores where the directory `scores` exists."""
    parts = []
    for quantizer in dict.fromkeys(line.quantizer for line in found):
        parts.append(f"## {quantizer}, KL over that of {base_of(found, quantizer)}\n\n{ratios(found, quantizer)}")
        budgets = sorted({line.budget for line in found if line.quantizer == quantizer})
        parts += [f"## {quantizer}, {b} bits per weight\n\n{table(found, quantizer, b)}" for b in budgets]
        if scores.exists():
            agreed = agreements(scores, quantizer)
            parts.append(f"## {quantizer}, agreement of scores with what was measured\n\n{agreed}")
    return "\n\n".join(parts)


def draw_damage(directory: Path, quantizer: str, path: Path) -> None:
    """Scores of matrices by a quantizer against what rounding them was measured to lose; nothing without both."""
    measured = directory / f"{quantizer}_{MEASURED}.json"
    if measured.exists() and (of_matrices := scores_like(directory, quantizer, measured)):
        write_damage_figure(of_matrices, Scores.read(measured), path)


def scores_like(directory: Path, quantizer: str, measured: Path) -> dict[str, Scores]:
    """The other scores of the same units, by their names in the files: those by the quantizer, and those by none."""
    damage, found = Scores.read(measured), {}
    for file in sorted(directory.glob("*.json")):
        if file != measured and not file.name.endswith(".seconds.json"):
            score = Scores.read(file)
            by = score.options.get("method", damage.options["method"])
            if list(score.values) == list(damage.values) and by == damage.options["method"]:
                found[file.stem.removeprefix(f"{quantizer}_")] = score
    return found


def agreements(directory: Path, quantizer: str) -> str:
    """How far scores of blocks, and of matrices, agree with what rounding each was measured to lose; Markdown."""
    rows = []
    for unit, name in (("block", f"{MEASURED}_by_blocks"), ("matrix", MEASURED)):
        measured = directory / f"{quantizer}_{name}.json"
        if not measured.exists():
            continue
        damage = Scores.read(measured)
        of_units = scores_like(directory, quantizer, measured)
        found = {score: agreement(values, damage) for score, values in of_units.items()}
        for score, how in sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].spearman, nan=-2.0)):
            rows.append([unit, score, f"{how.spearman:.2f}", f"{how.common} of {how.top}"])
    return markdown(["unit", "score", "Spearman", "of the quarter that loses most"], rows)


if __name__ == "__main__":
    main()
