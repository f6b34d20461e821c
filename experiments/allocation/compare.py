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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
from pydantic import AfterValidator, Field, PositiveInt, ValidationError, model_validator

from experiments.mistakes import in_one_line
from experiments.rows import append, claim, rows_of
from lq.allocation import ALLOCATORS, Plan, allocate
from lq.allocation.costs import Costs
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
from lq.models.source import Dequantized, InMemory
from lq.runs.config import (
    Bits,
    Budget,
    CalibrationSection,
    EvaluationSection,
    QuantizationSection,
    Section,
    at,
    first_problem,
    known,
    read_mapping,
)
from lq.search import SEARCHES, search

EXAMPLE = "experiments/allocation/standin.yaml"
NO_OPTIONS = {"name", "budgets"}  # of a section: they change no row


class QuantizerSection(QuantizationSection):
    """What all plans are rounded by, and the format that they share."""

    name: str


class ScoreSection(Section):
    """A metric; what it may know of quantizer and widths is filled in."""

    name: str
    metric: Annotated[str, known(METRICS)]
    options: dict[str, Any] = Field(default_factory=dict)


class PlanSection(Section):
    """An allocator on a score. A search begins at what that gives."""

    name: str
    score: str
    allocator: Annotated[str, known(ALLOCATORS)] = "knapsack"
    options: dict[str, Any] = Field(default_factory=dict)
    bits: list[Bits] | None = None  # the config's when null
    costs: Costs | None = None  # as `allocate` takes it
    seeds: PositiveInt = 1  # of the score: so many plans
    search: Annotated[str, known(SEARCHES)] | None = None
    search_options: dict[str, Any] = Field(default_factory=dict)
    quantizers: Annotated[list[str], Field(min_length=1)] | None = None  # all when null
    budgets: Annotated[list[Budget], Field(min_length=1)] | None = None  # some of the config's, all when null

    def searching(self, seed: int) -> dict[str, Any]:
        """The options of the search behind a score of `seed`: it draws anew as well."""
        return self.search_options | ({"seed": seed} if self.seeds > 1 else {})

    @model_validator(mode="after")
    def _check(self):
        ALLOCATORS.options(self.allocator, self.options)
        if self.search is not None:
            SEARCHES.options(self.search, self.searching(0))
        elif self.search_options:
            raise ValueError("search_options are given, but no search; name one, or leave them out")
        return self


def _once(budgets: list[float]) -> list[float]:
    for budget in budgets:
        if budgets.count(budget) > 1:
            raise ValueError(f"{budget} is listed twice; leave one out")
    return budgets


class Comparison(Section):
    title: str
    model: str
    output: str
    calibration: CalibrationSection
    evaluation: EvaluationSection
    quantizers: Annotated[list[QuantizerSection], Field(min_length=1)]
    bits: Annotated[list[Bits], Field(min_length=1)]
    budgets: Annotated[list[Budget], Field(min_length=1), AfterValidator(_once)]
    scores: Annotated[list[ScoreSection], Field(min_length=1)]
    plans: Annotated[list[PlanSection], Field(min_length=1)]

    def of(self, kind: str, name: str) -> Any:
        """The quantizer, score or plan of a name. Raises UserError for none."""
        found = {one.name: one for one in getattr(self, kind)}
        if name not in found:
            raise UserError(f"{name} is none of the {kind}; write one of {', '.join(found)}")
        return found[name]

    def score_options(self, quantizer: QuantizerSection, section: ScoreSection, seed: int) -> dict[str, Any]:
        """The options of a metric, with what it may know of the quantizer. `seed` is that of a score which draws."""
        kind = METRICS[section.metric].options
        fields = {field.name for field in dataclasses.fields(kind)}
        found: dict[str, Any] = {"batch_size": self.calibration.batch_size, "seed": seed}
        if issubclass(kind, QuantizedOptions):
            found |= quantizer.model_dump(include={"method", "options", "group_size", "symmetric", "by_energy"})
            found["bits"] = self.bits
            if section.options.get("unit") == "segment":
                found["by_energy"] = False  # its groups are so in any case
        return {name: value for name, value in found.items() if name in fields} | section.options

    @model_validator(mode="after")
    def _check(self):
        for kind in ("quantizers", "scores", "plans"):
            names = [section.name for section in getattr(self, kind)]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two {kind} named {name}; rename one")
        for plan in self.plans:
            with at(f"plan {plan.name}"):
                self.of("scores", plan.score)
                for name in plan.quantizers or []:
                    self.of("quantizers", name)
                for budget in plan.budgets or []:
                    if budget not in self.budgets:
                        raise UserError(f"budgets: {budget} is none of the config's; write some of {self.budgets}")
        self._check_rows()
        return self

    def _check_rows(self) -> None:
        """Raises UserError for scores that cannot be made, and where two rows, or files of scores, have one name."""
        rows, files = set(), {}
        for row, quantizer, plan, _, seed in plans(self):
            if row in rows:
                raise UserError(f"two rows named {row}; rename a plan or a quantizer")
            rows.add(row)
            score = self.of("scores", plan.score)
            options = self.score_options(quantizer, score, seed)
            file, named = score_file(quantizer, score, options)
            if file not in files:
                with at(f"score {score.name}, quantizer {quantizer.name}"):
                    METRICS.options(score.metric, options)
            if files.setdefault(file, named) != named:
                raise UserError(f"scores: {files[file]} and {named} would both be {file}.json; rename one")


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
    given = read_mapping(path, EXAMPLE)
    if "base" in given:
        with at(f"{path}: base"):
            given = _base(path, given.pop("base")) | given
    try:
        return Comparison.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


def _base(path: Path, name: object) -> dict[str, Any]:
    """What the config of a name, beside that at `path`, says. Raises UserError for one that is no base."""
    if not isinstance(name, str):
        raise UserError(f"{name!r} is no file; write the name of a config, or leave it out")
    file = path.parent / name
    if file.exists() and file.samefile(path):
        raise UserError(f"{name} is this config itself; name another, or leave it out")
    found = read_mapping(file, EXAMPLE)
    if "base" in found:
        raise UserError(f"{name} has a base itself, {found['base']}; name a config that has none")
    return found


def plans(comparison: Comparison) -> Iterator[tuple[str, QuantizerSection, PlanSection, float, int]]:
    """Name, quantizer, plan, budget and seed of every row."""
    for quantizer in comparison.quantizers:
        for plan in comparison.plans:
            if plan.quantizers is not None and quantizer.name not in plan.quantizers:
                continue
            for budget in plan.budgets or comparison.budgets:
                for seed in range(plan.seeds):
                    which = f", seed {seed}" if plan.seeds > 1 else ""
                    yield f"{quantizer.name}, {plan.name}, {budget} bpw{which}", quantizer, plan, budget, seed


def score_file(quantizer: QuantizerSection, section: ScoreSection, options: dict[str, Any]) -> tuple[str, str]:
    """What the file of a score with these options is called, without suffix, and whose it is, in words."""
    by, seed = "method" in options, options.get("seed")
    name = (f"{quantizer.name}-" if by else "") + section.name + ("" if seed is None else f"-{seed}")
    whose = section.name + (f" by {quantizer.name}" if by else "") + ("" if seed is None else f" of seed {seed}")
    return re.sub(r"\W+", "_", name), whose


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
        named = {kind: {s.name: s.model_dump(exclude=NO_OPTIONS) for s in found} for kind, found in sections.items()}
        claim(self.out, fixed, named)

    def scores(self, quantizer: QuantizerSection, section: ScoreSection, seed: int) -> tuple[Scores, float]:
        """Made once, kept as a file; and the seconds that it took. `seed` is that of a score which draws."""
        options = self.comparison.score_options(quantizer, section, seed)
        name, _ = score_file(quantizer, section, options)
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

    def plan(self, quantizer: QuantizerSection, section: PlanSection, budget: float, seed: int):
        """The plan, the forward passes of the calibration text that it took, and the seconds."""
        scores, seconds = self.scores(quantizer, self.comparison.of("scores", section.score), seed)
        started, spec = time.perf_counter(), quantizer.spec
        if scores.options.get("unit") == "segment":
            spec = dataclasses.replace(spec, by_energy=False)
        bits = section.bits or self.comparison.bits
        given: dict[str, Any] = {"bits": bits, "spec": spec, "method": section.allocator, "options": section.options}
        plan = allocate(scores, bpw=budget, costs=section.costs, **given)
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
            options=section.searching(seed),
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
            # The packed model is a program of its own for every plan, most of the time compiling.
            found = evaluate(Dequantized(model), self.windows, **data)
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


def chosen(comparison: Comparison, only: str) -> list[tuple[str, QuantizerSection, PlanSection, float, int]]:
    """The rows whose name the regular expression `only` is found in. Raises UserError where there are none."""
    rows = list(plans(comparison))
    try:
        found = [row for row in rows if re.search(only, row[0])]
    except re.error as error:
        raise UserError(f"--only {only}: not a regular expression ({error}); write part of a row's name") from None
    if not found:
        raise UserError(f"--only {only}: found in none of {len(rows)} rows; write part of a name such as {rows[0][0]}")
    return found


def run(comparison: Comparison, only: str, out: Path) -> None:
    """Measures the rows that are not in `out` yet. Raises UserError where none of them was possible."""
    todo = chosen(comparison, only)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; give a directory")
    bench, file = Bench(comparison, out), out / "rows.jsonl"
    bench.claim()
    refused = []
    for i, (name, *what) in enumerate(todo, 1):
        if name in {row.name for row in rows_of(file, Measured)}:
            continue
        try:
            row = bench.measure(name, *what)
        except UserError as error:
            print(f"{i}/{len(todo)} {name}: not possible: {error}", flush=True)
            refused.append(name)
            continue
        append(file, row)
        print(f"{i}/{len(todo)} {name}: {row.bpw:.4f} bpw, {row.bytes_on_disk} bytes, perplexity {row.perplexity:.4f}, "
              f"KL {row.kl:.5f}", flush=True)  # fmt: skip
    if len(refused) == len(todo):
        raise UserError(f"{out}: none of {len(todo)} rows was possible; the reasons are above")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--only", default="", help="a regular expression: rows whose name it is found in")
    parser.add_argument("--out", type=Path, help="directory for rows.jsonl; the config's output when not given")
    arguments = parser.parse_args(given)
    with in_one_line("compare"):
        comparison = read(arguments.config)
        run(comparison, arguments.only, arguments.out or Path(comparison.output))


if __name__ == "__main__":
    main()
