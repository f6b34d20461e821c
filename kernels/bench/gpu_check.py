"""One command that shows what the GPU kernels do on the GPU at hand: right or wrong, tuned, how fast.

    python kernels/bench/gpu_check.py --out DIR

Needs this repository and jax, nothing installed besides; torch is timed beside ours where it is there. Takes under
eight minutes (`--minutes`), in order of importance: numerics against float64, tuning, a whole decoding step of a
Llama-3-8B-shaped model, single products. What there was no time for is said. Writes DIR/gpu_check.json,
DIR/gpu_check.txt (the tables) and DIR/tables/ (the tuning table, to be copied to lq_kernels/tables/).

`--smoke` runs the same logic on any machine: tiny shapes, kernels interpreted, figures that mean nothing.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside us
if "--smoke" in sys.argv:
    os.environ.setdefault("NPROC", "16")  # threads of a thread block that Pallas' interpreter runs at once
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import decode_step
import jax
import measure
import numerics
import products
import torch_baselines

from lq_kernels import tune, tuning
from lq_kernels.registry import load_backend

# speed-up over the bfloat16 dot that is aimed at, 8192 x 8192: (width, rows) -> times
TARGETS = {(bits, m): t for bits, t in ((8, 1.8), (4, 3.0), (3, 3.6), (2, 4.5)) for m in (1, 16)}
TARGETS |= {(bits, 64): 1.6 for bits in (8, 4, 3, 2)} | {(bits, m): 0.95 for bits in (8, 4, 3, 2) for m in (1024, 4096)}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run; shares of the time that each stage may use."""

    backend: str = "mosaic_gpu"
    shapes: tuple = (
        (8192, 8192),
        (4096, 14336),
        (14336, 4096),
        (4096, 4096),
        (8192, 28672),
        (4096, 11008),
        (4096, 1024),
    )
    rows: tuple = (1, 16, 64, 1024, 4, 8, 32, 128, 256, 512, 2048, 4096)
    widths: tuple = (4, 3, 2, 8)
    tuned_shapes: tuple = ((8192, 8192), (4096, 14336), (14336, 4096), (4096, 6144), (4096, 4096), (4096, 28672))
    tuned_rows: tuple = (1, 16, 64, 1024)
    candidates: int | None = None  # tried for each product, at most
    decoded: tuple = (None, 3, 4, 2)  # bfloat16; 3.25, 4.25 and 2.25 bits per weight
    cache_bytes: int = 60 << 20
    repeats: int = 20
    small: bool = False
    interpret: bool = False
    model: decode_step.Shape = decode_step.LLAMA_3_8B
    context: int = 1024
    steps: int = 32


SMOKE = Size(
    shapes=((128, 128),),
    rows=(1,),
    widths=(2,),
    tuned_shapes=((128, 128),),
    tuned_rows=(1,),
    candidates=2,
    decoded=(None, 3),
    cache_bytes=0,
    repeats=2,
    small=True,
    interpret=True,
    model=decode_step.Shape(1, 128, 1, 1, 128, 128, 128),
    context=16,
    steps=1,
)


def run_numerics(size: Size, deadline: float) -> dict:
    return numerics.check(size.backend, small=size.small, interpret=size.interpret, deadline=deadline)


def run_tuning(size: Size, folder: Path, deadline: float) -> dict:
    """Every problem's best, and all that was tried; tables are in use from here on."""
    found, left = [], []
    for K, N in size.tuned_shapes:
        for bits in size.widths:
            for rows in size.tuned_rows:
                name = f"W{bits} {K}x{N} M{rows}"
                if time.monotonic() > deadline:
                    left.append(name)
                    continue
                w = tune.random_packed(bits, K, N, 128)
                backend = load_backend(size.backend)
                problem, outcomes = tune.tune(
                    backend,
                    w,
                    rows,
                    cache_bytes=size.cache_bytes,
                    repeats=max(2, size.repeats // 2),
                    workers=os.cpu_count() or 1,
                    deadline=deadline,
                    limit=size.candidates,
                    interpret=size.interpret,
                )
                found.append({"problem": tuning.key(problem), "outcomes": [dataclasses.asdict(o) for o in outcomes]})
                if outcomes[0].timing is not None:
                    tune.write_entry(folder, backend, problem, outcomes[0].config)
    return {"problems": found, "left": left}


def run_products(size: Size, deadline: float) -> dict:
    options = {"cache_bytes": size.cache_bytes, "repeats": size.repeats, "deadline": deadline}
    found = products.time_all(size.shapes, size.rows, size.widths, size.backend, interpret=size.interpret, **options)
    asked = len(size.shapes) * len(size.rows) * len(products.methods(size.widths, size.backend))
    return {"products": [dataclasses.asdict(p) for p in found], "left": asked - len(found)}


def run_torch(size: Size, deadline: float) -> dict:
    if (reason := torch_baselines.available()) is not None:
        return {"absent": reason}
    options = {"cache_bytes": size.cache_bytes, "repeats": size.repeats, "deadline": deadline}
    return {"products": torch_baselines.time_all(size.shapes[:2], size.rows[:4], **options)}


def run_decoding(size: Size, deadline: float) -> dict:
    found, left = [], []
    for bits in size.decoded:
        if time.monotonic() > deadline:
            left.append(bits)
            continue
        options = {"context": size.context, "steps": size.steps, "repeats": max(2, size.repeats // 4)}
        found.append(decode_step.time_decoding(size.model, bits, size.backend, interpret=size.interpret, **options))
    return {"steps": found, "left": left}


STAGES = (  # name, share of the time it may have used when it ends
    ("numerics", 0.25),
    ("tuning", 0.5),
    ("decoding", 0.7),
    ("products", 0.95),
    ("torch", 1.0),
)


def run(size: Size, out: Path, minutes: float) -> dict:
    """All stages; the results so far are on disk after each."""
    start = time.monotonic()
    os.environ[tuning.DIRECTORY] = str(out / "tables")
    results = {"environment": measure.environment(), "minutes_allowed": minutes}
    results["copy_bytes_per_second"] = measure.copy_bandwidth(1 << (16 if size.small else 30))
    runs = {
        "numerics": lambda deadline: run_numerics(size, deadline),
        "tuning": lambda deadline: run_tuning(size, out / "tables", deadline),
        "products": lambda deadline: run_products(size, deadline),
        "decoding": lambda deadline: run_decoding(size, deadline),
        "torch": lambda deadline: run_torch(size, deadline),
    }
    for name, share in STAGES:
        began = time.monotonic()
        try:
            results[name] = runs[name](start + share * minutes * 60)
        except Exception as problem:  # one stage that breaks must not cost the others
            results[name] = {"failed": f"{type(problem).__name__}: {problem}"[:2000]}
        results[name]["seconds"] = time.monotonic() - began
        tuning.forget()
        measure.write_json(out / "gpu_check.json", results)
    (out / "gpu_check.txt").write_text(report(results) + "\n", encoding="utf-8")
    return results


def report(results: dict) -> str:
    """The tables a person reads."""
    env, bandwidth = results["environment"], results["copy_bytes_per_second"]
    parts = [f"{env['device_kind']}, jax {env['versions']['jax']}; copies at {bandwidth / 1e9:.0f} GB/s"]
    parts += [f"{name}: failed: {results[name]['failed']}" for name, _ in STAGES if "failed" in results[name]]
    checked = results["numerics"]
    if "run" in checked:
        parts.append(
            f"numerics: {checked['run']} cases, {len(checked['failures'])} failed, {checked['left']} not run; "
            f"worst error {checked['worst_over_bound']:.2f} of the bound"
        )
        parts += [f"  {failure}" for failure in checked["failures"][:10]]
    timed = [products.Product(**p) for p in results["products"].get("products", [])]
    timed += [
        products.Product(**p) if "microseconds" in p else products.Product(**p, microseconds=None)
        for p in results["torch"].get("products", [])
    ]
    parts.append(measure.table(products.HEADER, products.lines(timed, bandwidth)))
    parts.append(targets(timed))
    steps = results["decoding"].get("steps", [])
    rows = [
        [
            s["bits"] or "bf16",
            f"{s['bits_per_weight_on_device']:.2f}",
            f"{s['milliseconds']:.2f}",
            f"{s['tokens_per_second']:.1f}",
            f"{steps[0]['milliseconds'] / s['milliseconds']:.2f}",
        ]
        for s in steps
    ]
    parts.append(measure.table(["width", "bpw on device", "ms/step", "tokens/s", "x bf16"], rows))
    return "\n\n".join(parts)


def targets(timed: list[products.Product]) -> str:
    """Measured speed-up beside what is aimed at, on 8192 x 8192."""
    at = {(p.method, p.rows): p.microseconds for p in timed if (p.K, p.N) == (8192, 8192) and (p.microseconds or 0) > 0}
    rows = []
    for (bits, m), aim in TARGETS.items():
        if (f"W{bits}", m) in at and ("bf16", m) in at:
            reached = at["bf16", m] / at[f"W{bits}", m]
            rows.append([f"W{bits}", m, f"{reached:.2f}", aim, "met" if reached >= aim else "missed"])
    return measure.table(["8192x8192", "M", "x bf16", "aim", ""], rows)


def shortcomings(results: dict) -> list[str]:
    """Why the check has not passed, a line each: what broke, is wrong or was not checked. Empty when it has."""
    found = [f"{name} broke: {results[name]['failed']}" for name, _ in STAGES if "failed" in results[name]]
    checked = results["numerics"]
    if "run" in checked:
        found += [f"{len(checked['failures'])} wrong products"] if checked["failures"] else []
        found += [f"{checked['left']} products not checked: no time was left"] if checked["left"] else []
    timed = results["products"].get("products", [])
    ours = [p for p in timed if p["method"].startswith("W") and p["failure"]]
    found += [f"{p['method']} {p['K']}x{p['N']} M{p['rows']}: {p['failure']}" for p in ours]
    tuned = results["tuning"].get("problems", [])
    if tuned and not any(outcome["timing"] for problem in tuned for outcome in problem["outcomes"]):
        found.append("no configuration ran: see the reasons in gpu_check.json")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--backend", default=Size.backend)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpreted: exercises the logic anywhere")
    options = parser.parse_args()
    if not options.smoke and jax.devices()[0].platform != "gpu":
        print("gpu_check: no GPU here; --smoke exercises the logic on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    size = dataclasses.replace(SMOKE if options.smoke else Size(), backend=options.backend)
    results = run(size, options.out, options.minutes)
    print(report(results))
    print("\n".join(problems := shortcomings(results)), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
