"""The tables of this folder's README, in Markdown, from a run's `results.json`.

python -m experiments.layerwise_quantization.tables runs/layerwise_quantization/standin
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from lq.runs.results import Results, Row

LIMITS = (1.05, 1.10, 1.25)  # of the rise of perplexity that a reach allows


def reach(sweep: list[Row], limit: float) -> int:
    """How many blocks can be lowered before perplexity first exceeds `limit` times that of none lowered."""
    start = sweep[0].perplexity
    return next((k for k, row in enumerate(sweep) if not row.perplexity <= limit * start), len(sweep)) - 1


def sweeps(results: Results) -> dict[str, list[list[Row]]]:
    """Order -> one sweep per seed, each from no block lowered to all."""
    found = defaultdict(lambda: defaultdict(list))
    for row in results.rows:
        if row.group == "move":
            found[row.order][row.seed].append(row)
    return {order: list(seeds.values()) for order, seeds in found.items()}


def spread(values: list[float], form: str) -> str:
    """One value, or the mean of several and their range."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{mean(values):{'.1f' if form == 'd' else form}} ({min(values):{form}} to {max(values):{form}})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reach_table(results: Results) -> str:
    rows = []
    for order, seeds in sweeps(results).items():
        cells = [spread([reach(sweep, limit) for sweep in seeds], "d") for limit in LIMITS]
        rows.append([order, *cells])
    return table(["order", *(f"{100 * (limit - 1):.0f} %" for limit in LIMITS)], rows)


def mix_table(results: Results) -> str:
    plans = [row for row in results.rows if row.group == "plan"]
    budgets = sorted({row.target_bpw for row in plans}, reverse=True)
    code = {b: next(row.code_bits for row in plans if row.target_bpw == b) for b in budgets}
    rows = []
    for order in dict.fromkeys(row.order for row in plans):
        cells = [[r.perplexity for r in plans if r.order == order and r.target_bpw == b] for b in budgets]
        rows.append([order, *(spread(values, ".2f") for values in cells)])
    uniform = [row for row in results.rows if row.group in ("uniform", "finer_groups")]
    largest = [max((r for r in uniform if r.bpw <= b), key=lambda r: r.bpw) for b in budgets]
    rows.append(["largest uniform that is no larger", *(f"{r.perplexity:.2f} ({r.name})" for r in largest)])
    return table(["order", *(f"{b:g} ({code[b]:.4g} code bits)" for b in budgets)], rows)


def uniform_table(results: Results) -> str:
    rows = [[r.name, f"{r.bpw:.4f}", f"{r.perplexity:.2f}", f"{r.kl:.4f}", f"{100 * r.top1:.1f} %"]
            for r in results.rows if r.group in ("original", "uniform", "finer_groups")]  # fmt: skip
    return table(["model", "bits per weight", "perplexity", "KL", "top-1"], rows)


def main() -> None:
    results = Results.read(Path(sys.argv[1]) / "results.json")
    print("Reach, blocks:\n", reach_table(results), "\nMixes, perplexity:\n", mix_table(results), sep="\n")
    print("\nUniform:\n", uniform_table(results), f"\n{results.conclusion}", sep="\n")


if __name__ == "__main__":
    main()
