"""Measures every way of spending a bit budget that a config names: scores x allocators, searches, controls.

    python -m experiments.allocation.compare CONFIG.yaml [--only REGEX] [--out DIR]

Every plan is quantized by the real quantizer, written, and read back; its bytes are those of the files. A line of
`rows.jsonl` for each, appended as soon as it is measured; what is there is not measured again, so that an interrupted
comparison goes on where it was, and several processes may share a directory. Scores lie in `scores/`, made once, with
what they took. A config with `base: OTHER.yaml`, beside it, is that one but for what it says itself.
"""

import argparse
import dataclasses
import functools
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from experiments.rows import append, claim, rows_of
from lq.allocation import Plan, allocate
from lq.assets import resolve_data, resolve_model
from lq.atomic import write_text
from lq.calibration.data import calibration_windows, evaluation_windows
from lq.checkpoint import open_quantized
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import METRICS, Scores, score
from lq.importance.quantized import QuantizedOptions
from lq.models.fingerprint import fingerprint
from lq.models.loading import load_tokenizer, open_checkpoint
from lq.models.source import InMemory
from lq.runs.config import Bits, CalibrationSection, EvaluationSection, QuantizationSection, Section
from lq.search import search


class QuantizerSection(QuantizationSection):
    """What all plans are rounded by, and the format that they share."""

    name: str


class ScoreSection(Section):
    """A metric; what it may know of quantizer and widths is filled in."""

    name: str
    metric: str
    options: dict[str, Any] = Field(default_factory=dict)


class PlanSection(Section):
    """An allocator on a score. A search begins at what that gives."""

    name: str
    score: str
    allocator: str = "knapsack"
    options: dict[str, Any] = Field(default_factory=dict)
    bits: list[Bits] | None = None  # the config's when null
    costs: str | None = None  # as `allocate` takes it
    seeds: PositiveInt = 1  # of the score: so many plans
    search: str | None = None
    search_options: dict[str, Any] = Field(default_factory=dict)
    quantizers: list[str] | None = None  # all when null


class Comparison(Section):
    title: str
    model: str
    output: str
    calibration: CalibrationSection
    evaluation: EvaluationSection
    quantizers: Annotated[list[QuantizerSection], Field(min_length=1)]
    bits: Annotated[list[Bits], Field(min_length=1)]
    budgets: Annotated[list[PositiveFloat], Field(min_length=1)]
    scores: Annotated[list[ScoreSection], Field(min_length=1)]
    plans: Annotated[list[PlanSection], Field(min_length=1)]

    def of(self, kind: str, name: str) -> Any:
        """The quantizer, score or plan of a name. Raises UserError for none."""
        found = {one.name: one for one in getattr(self, kind)}
        if name not in found:
            raise UserError(f"{self.title}: {name} is none of the {kind}; write one of {', '.join(found)}")
        return found[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One plan: its name is unique."""

    name: str
    quantizer: str
    plan: str
    budget: float
    seed: int
    bpw: float
    code_bits: float
    bytes_on_disk: int  # of the shards
    perplexity: float
    kl: float
    top1: float
    passes: float | None  # forward passes of the calibration text that scoring and searching took
    seconds: float  # of both


def read(path: Path) -> Comparison:
    """Raises UserError, one line with the key, for a config that is none."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(given, dict) and (base := given.pop("base", None)) is not None:
            given = dict(yaml.safe_load((path.parent / str(base)).read_text(encoding="utf-8"))) | given
        comparison = Comparison.model_validate(given)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such config; see experiments/allocation/standin.yaml") from None
    except (yaml.YAMLError, ValidationError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    for plan in comparison.plans:
        comparison.of("scores", plan.score)
        for name in plan.quantizers or []:
            comparison.of("quantizers", name)
    return comparison


def plans(comparison: Comparison) -> Iterator[tuple[str, QuantizerSection, PlanSection, float, int]]:
    """Name, quantizer, plan, budget and seed of every row."""
    for quantizer in comparison.quantizers:
        for plan in comparison.plans:
            if plan.quantizers is not None and quantizer.name not in plan.quantizers:
                continue
            for budget in comparison.budgets:
                for seed in range(plan.seeds):
                    which = f", seed {seed}" if plan.seeds > 1 else ""
                    yield f"{quantizer.name}, {plan.name}, {budget} bpw{which}", quantizer, plan, budget, seed


class Bench:
    """What all measurements share: the model, its texts, the original's states, scores that were made."""

    def __init__(self, comparison: Comparison, out: Path):
        self.comparison, self.out = comparison, out
        self.source = open_checkpoint(resolve_model(comparison.model))
        self.original = InMemory(self.source.config, self.source.params())
        tokenizer, c, e = load_tokenizer(self.source.path), comparison.calibration, comparison.evaluation
        text = resolve_data(c.data, "calibration")
        self.calibration = calibration_windows(tokenizer, text, c.samples, c.length, c.seed)
        text = resolve_data(e.data, "evaluation")
        self.windows = evaluation_windows(tokenizer, text, e.window, stride=e.stride, limit=e.windows)

    @functools.cached_property
    def reference(self):
        e = self.comparison.evaluation
        return make_reference(self.original, self.windows, batch_size=e.batch_size, dtype=jnp.dtype(e.dtype))

    def claim(self) -> None:
        """Says in the directory what its rows are of; see `experiments.rows.claim`."""
        c = self.comparison
        fixed = {
            "model": fingerprint(self.source),
            "evaluation": self.windows.fingerprint,
            "calibration": self.calibration.fingerprint,
            "batch_size": c.calibration.batch_size,
            "bits": c.bits,
        }
        sections = {"quantizers": c.quantizers, "scores": c.scores, "plans": c.plans}
        named = {kind: {s.name: s.model_dump(exclude={"name"}) for s in found} for kind, found in sections.items()}
        claim(self.out, fixed, named)

    def scores(self, quantizer: QuantizerSection, section: ScoreSection, seed: int) -> tuple[Scores, float]:
        """Made once, kept as a file; and the seconds that it took. `seed` is that of a score which draws."""
        options = self._options(quantizer, section, seed)
        of = f"{quantizer.name}-" if "method" in options else ""
        name = re.sub(r"\W+", "_", f"{of}{section.name}" + (f"-{options['seed']}" if "seed" in options else ""))
        file, took = self.out / "scores" / f"{name}.json", self.out / "scores" / f"{name}.seconds.json"
        if took.exists():
            return Scores.read(file), json.loads(took.read_text(encoding="utf-8"))
        started = time.perf_counter()
        found = score(self.original, section.metric, self.calibration, options)
        seconds = round(time.perf_counter() - started, 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        found.write(file)
        write_text(took, json.dumps(seconds))
        return found, seconds

    def _options(self, quantizer: QuantizerSection, section: ScoreSection, seed: int) -> dict[str, Any]:
        """The options of a metric, with what it may know of the quantizer."""
        kind = METRICS[section.metric].options
        known = {field.name for field in dataclasses.fields(kind)}
        found: dict[str, Any] = {"batch_size": self.comparison.calibration.batch_size, "seed": seed}
        if issubclass(kind, QuantizedOptions):
            found |= quantizer.model_dump(include={"method", "options", "group_size", "symmetric", "by_energy"})
            found["bits"] = self.comparison.bits
            if section.options.get("unit") == "segment":
                found["by_energy"] = False  # its groups are so in any case
        return {name: value for name, value in found.items() if name in known} | section.options

    def plan(self, quantizer: QuantizerSection, section: PlanSection, budget: float, seed: int):
        """The plan, the forward passes of the calibration text that it took, and the seconds."""
        scores, seconds = self.scores(quantizer, self.comparison.of("scores", section.score), seed)
        started, spec = time.perf_counter(), quantizer.spec
        if scores.options.get("unit") == "segment":
            spec = dataclasses.replace(spec, by_energy=False)
        bits = section.bits or self.comparison.bits
        given: dict[str, Any] = {"bits": bits, "spec": spec, "method": section.allocator, "options": section.options}
        plan = allocate(scores, bpw=budget, costs=section.costs, **given)  # type: ignore[arg-type]
        passes = scores.passes
        if section.search is not None:
            plan = self._searched(quantizer, section, plan, seed)
            passes = (passes or 0.0) + plan.provenance["passes"]
        return plan, passes, seconds + time.perf_counter() - started

    def _searched(self, quantizer: QuantizerSection, section: PlanSection, plan: Plan, seed: int) -> Plan:
        return search(
            self.original,
            plan,
            self.calibration,
            bits=section.bits or self.comparison.bits,
            method=section.search or "",
            options={**section.search_options, **({"seed": seed} if section.seeds > 1 else {})},
            recipe=quantizer.pipeline.recipe,
            batch_size=self.comparison.calibration.batch_size,
        )

    def measure(self, name: str, quantizer: QuantizerSection, section: PlanSection, budget: float, seed: int):
        """Makes the plan, quantizes by it, writes, reads back and evaluates."""
        plan, passes, seconds = self.plan(quantizer, section, budget, seed)
        pipeline, batch_size = quantizer.pipeline, self.comparison.calibration.batch_size
        windows = self.calibration if pipeline.recipe.calibrated else None
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".written-") as directory:
            written = Path(directory) / "model"
            plan = pipeline.write(self.source, plan, written, windows, batch_size=batch_size)
            size = sum(shard.stat().st_size for shard in written.glob("*.safetensors"))
            e, model = self.comparison.evaluation, open_quantized(written)
            data = {"reference": self.reference, "batch_size": e.batch_size, "dtype": jnp.dtype(e.dtype)}
            found = evaluate(model, self.windows, **data)
        assert found.kl is not None
        assert found.top1 is not None
        return Measured(
            name=name,
            quantizer=quantizer.name,
            plan=section.name,
            budget=budget,
            seed=seed,
            bpw=plan.bpw,
            code_bits=plan.code_bits,
            bytes_on_disk=size,
            perplexity=found.perplexity,
            kl=found.kl,
            top1=found.top1,
            passes=passes,
            seconds=round(seconds, 1),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--only", type=re.compile, default="", help="rows whose name this is found in")
    parser.add_argument("--out", type=Path, help="directory for rows.jsonl; the config's output when not given")
    arguments = parser.parse_args()
    comparison = read(arguments.config)
    out = arguments.out or Path(comparison.output)
    out.mkdir(parents=True, exist_ok=True)
    bench, file = Bench(comparison, out), out / "rows.jsonl"
    bench.claim()
    todo = [(name, *what) for name, *what in plans(comparison) if re.search(arguments.only, name)]
    for i, (name, *what) in enumerate(todo, 1):
        if name in {row.name for row in rows_of(file, Measured)}:
            continue
        try:
            row = bench.measure(name, *what)
        except UserError as error:
            print(f"{i}/{len(todo)} {name}: not possible: {error}", flush=True)
            continue
        append(file, row)
        print(f"{i}/{len(todo)} {name}: {row.bpw:.4f} bpw, {row.bytes_on_disk} bytes, perplexity {row.perplexity:.4f}, "
              f"KL {row.kl:.5f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"compare: {error}") from None
