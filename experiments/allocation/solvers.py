"""Times every allocator that goes by losses on a problem of Llama-2-7B's size: 224 matrices, six widths.

python -m experiments.allocation.solvers

The losses are drawn: log-normal over the matrices, a quarter for every bit more, so that solvers agree or differ as on
measured ones. A line for each allocator: seconds, the slowest of the budgets, and what its plans lose over the exact
ones.
"""

import time
from statistics import mean

import numpy as np

from experiments.rows import markdown
from lq.allocation import Plan, allocate
from lq.importance import Scores
from lq.numerics.spec import QuantSpec

BLOCKS, WIDTH, INNER = 32, 4096, 11008
BITS, BUDGETS = (2, 3, 4, 5, 6, 8), (2.5, 3.0, 3.25, 3.5, 4.25)
EXACT = "knapsack"
ALLOCATORS = (EXACT, "milp", "greedy", "lagrangian", "annealing", "water_filling", "proportional")


def llama_2_7b(seed: int = 0) -> Scores:
    """Its matrices, with losses that are drawn."""
    rng, shapes = np.random.default_rng(seed), {}
    for block in range(BLOCKS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"block_{block}/attention/{name}"] = (WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            shapes[f"block_{block}/mlp/{name}"] = (WIDTH, INNER)
        shapes[f"block_{block}/mlp/down_proj"] = (INNER, WIDTH)
    costs = {}
    for path in shapes:
        losses = rng.lognormal() * 4.0 ** -np.array(BITS) * rng.lognormal(0, 0.2, len(BITS))
        costs[path] = {str(QuantSpec(bits=bits)): float(loss) for bits, loss in zip(BITS, losses, strict=True)}
    values = {path: max(of_path.values()) for path, of_path in costs.items()}
    return Scores(metric="drawn", values=values, model="Llama-2-7B", shapes=shapes, other_weights=0, costs=costs)


def lost(scores: Scores, plan: Plan) -> float:
    return sum(scores.costs[path][str(spec)] for path, spec in plan.specs.items())


def main() -> None:
    scores, exact, rows = llama_2_7b(), {}, []
    for method in ALLOCATORS:
        seconds, ratios = [], []
        for bpw in BUDGETS:
            started = time.perf_counter()
            plan = allocate(scores, bpw=bpw, bits=BITS, method=method)
            seconds.append(time.perf_counter() - started)
            exact.setdefault(bpw, lost(scores, plan))
            ratios.append(lost(scores, plan) / exact[bpw])
        rows.append([method, f"{max(seconds):.2f}", f"{mean(ratios):.4f}"])
    print(markdown(["allocator", "seconds, the slowest budget", "loss over the exact plan's, mean"], rows))


if __name__ == "__main__":
    main()
