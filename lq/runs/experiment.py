"""One experiment from config to results: score, allocate, quantize, evaluate, for every order and budget of the sweep.

A run directory holds everything about it and can be resumed:

    config.yaml      the config, every default filled in
    run.json         which config, model and tokens it belongs to; a directory of another experiment is refused. And the
                     seconds and the peak memory of all sessions so far: an interrupted run has several
    scores/*.json    one per order
    plans/*.json     one per plan, also where two orders give the same
    rows.jsonl       one line per evaluated model, appended as soon as it is measured
    results.json, report.html, report.png, results.csv
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

from lq.assets import resolve_data, resolve_model
from lq.atomic import write_text
from lq.calibration.data import Windows, calibration_windows, evaluation_windows
from lq.calibration.stream import check_context
from lq.errors import UserError
from lq.evaluation import Reference, evaluate, make_reference, scored_targets
from lq.importance import METRICS, Scores, reverse, score
from lq.models.fingerprint import fingerprint
from lq.models.loading import load_tokenizer, open_checkpoint
from lq.models.matrices import parameter_count
from lq.progress import Progress
from lq.runs.candidates import Candidate, candidates, check_budgets, orders_of
from lq.runs.conclusion import conclude, is_score
from lq.runs.config import BATCH_SIZE, Experiment, Order, at, dump_experiment
from lq.runs.environment import describe_environment, peak_memory_bytes
from lq.runs.results import Results, Row
from lq.runs.weighed import COUNTED, Weighed

CACHE_LIMIT = 2_000_000_000  # bytes of bfloat16 weights up to which packed parts are kept between candidates


def run_experiment(
    experiment: Experiment, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> Results:
    """Runs what is not yet measured and writes the report.

    Args:
      experiment: the checked config.
      resume: go on with what the run directory already holds; it must be of the same config, model and tokens.
      overwrite: measure again what the directory holds; it must be of an experiment of the same title.
      progress: where to show how far it is; nowhere when None.

    Raises:
      UserError: the directory is of another experiment, or holds this one and neither `resume` nor `overwrite` is set.
    """
    with at(experiment.file):
        run = Run(experiment, progress or Progress(quiet=True))
        run.claim_directory(resume, overwrite)
        scores = run.scores()
        todo = list(candidates(experiment, run.source.config, run.fingerprint, scores))
        for pattern in dict.fromkeys(p for c in todo if c.plan for p in c.plan.provenance.get("unused_pins", [])):
            run.progress.note(f"pin {pattern!r} matches no matrix")
        rows = run.measure_all(todo)
        run.write_record()
        results = run.results(scores, rows)
        results.write(run.directory / "results.json")
        from lq.runs.report import write_report

        write_report([(experiment.title, results)], run.directory)
        return results


class Run:
    """The state of one experiment: what is open and where it is kept."""

    def __init__(self, experiment: Experiment, progress: Progress):
        self.started = time.perf_counter()
        self.experiment, self.progress = experiment, progress
        self.directory = Path(experiment.output)
        with at("model"):
            self.source = open_checkpoint(resolve_model(experiment.model))
            self.fingerprint = fingerprint(self.source)
        check_budgets(experiment, self.source.config)
        self.calibration, self.windows = self._cut_windows()
        self.pipeline = experiment.quantization.pipeline
        self.packed = {} if 2 * parameter_count(self.source.config) < CACHE_LIMIT else None
        self.earlier: dict = {}  # what run.json held when this session began
        self.said: set[str] = set()  # notes of the quantizer, which are the same for many candidates

    def _cut_windows(self) -> tuple[Windows | None, Windows]:
        """Calibration windows, where an order or the quantizer needs them, and those to evaluate on."""
        c, e, config = self.experiment.calibration, self.experiment.evaluation, self.source.config
        needed = any("calibration" in METRICS[order.metric].needs for order in orders_of(self.experiment))
        needed |= self.experiment.quantization.pipeline.recipe.calibrated
        if needed:
            check_context(config, c.length, "calibration.length")
        check_context(config, e.window, "evaluation.window")
        with at("model"):
            tokenizer = load_tokenizer(self.source.path)
        calibration = None
        if needed:
            data = resolve_data(c.data, "calibration")
            with at("calibration.data"):
                calibration = calibration_windows(tokenizer, data, c.samples, c.length, c.seed)
        data = resolve_data(e.data, "evaluation")
        with at("evaluation.data"):
            return calibration, evaluation_windows(tokenizer, data, e.window, stride=e.stride, limit=e.windows)

    def claim_directory(self, resume: bool, overwrite: bool) -> None:
        """Makes the run directory this experiment's. Raises UserError, with the key, when it cannot be."""
        with at("output"):
            try:
                self._claim_directory(resume, overwrite)
            except OSError as error:
                raise UserError(
                    f"{self.directory}: cannot be written ({error.strerror}); give another output"
                ) from error

    def _claim_directory(self, resume: bool, overwrite: bool) -> None:
        identity = self._identity()
        record, found = self.directory / "run.json", {}
        if (self.directory / "rows.jsonl").exists() and record.exists():
            found = _read_record(record)
            if overwrite and found.get("title") != identity["title"]:
                raise UserError(f"{self.directory}: a run of another experiment; give another output or remove it")
            if not overwrite and found.get("model") != identity["model"]:
                raise UserError(f"{self.directory}: a run of another model; give another output or remove it")
            if not overwrite and found.get("experiment") != identity["experiment"]:
                raise UserError(f"{self.directory}: a run of another config; give another output or remove it")
            if not overwrite and not resume:
                raise UserError(
                    f"{self.directory}: already holds this run; add --resume to go on, or give another output"
                )
        elif not record.exists() and self.directory.exists() and any(self.directory.iterdir()):
            raise UserError(f"{self.directory}: not empty, and no run of lq; give another output")
        if overwrite:
            (self.directory / "rows.jsonl").unlink(missing_ok=True)
            found = {}
        self.earlier = found
        self.write_record()
        write_text(self.directory / "config.yaml", dump_experiment(self.experiment))

    def _identity(self) -> dict:
        """What tells this experiment from any other. The title and where it is written do not."""
        config = self.experiment.model_dump(exclude={"output", "title"})
        calibration = self.calibration.fingerprint if self.calibration else None
        text = json.dumps([config, self.fingerprint, calibration, self.windows.fingerprint])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {"experiment": digest, "model": self.fingerprint, "title": self.experiment.title}

    def taken(self) -> dict:
        """Time and memory so far, of the sessions before this one too."""
        return {
            "seconds": self.earlier.get("seconds", 0.0) + time.perf_counter() - self.started,
            "peak_memory_bytes": max(self.earlier.get("peak_memory_bytes", 0), peak_memory_bytes()),
        }

    def write_record(self) -> None:
        write_text(self.directory / "run.json", json.dumps({**self._identity(), **self.taken()}))

    def scores(self) -> dict[tuple[str, int | None], Scores]:
        """Every order of the config, computed once; keys are (order name, seed)."""
        found = {}
        straight: dict[tuple[str, int | None], Scores] = {}  # an order and its reverse are one computation
        wanted = [(order, seed) for order in orders_of(self.experiment) for seed in order.each_seed()]
        with self.progress.stage("score", len(wanted)) as step:
            for order, seed in wanted:
                key = (order.name, seed)
                if key not in found:
                    measured = (order.name.removeprefix("reverse "), seed)
                    if measured not in straight:
                        straight[measured] = self._score(order, seed)
                    found[key] = reverse(straight[measured]) if order.reverse else straight[measured]
                    name = order.name.replace(" ", "_") + ("" if seed is None else f"_{seed}")
                    found[key].write(self.directory / "scores" / f"{name}.json")
                step(order.name)
        return found

    def _score(self, order: Order, seed: int | None) -> Scores:
        """The scores of an order's metric, not reversed; the calibration's batch size unless the order has its own."""
        options = order.options if seed is None else {**order.options, "seed": seed}
        if any(field.name == BATCH_SIZE for field in dataclasses.fields(METRICS[order.metric].options)):
            options = {BATCH_SIZE: self.experiment.calibration.batch_size, **options}
        return score(self.source, order.metric, self.calibration, options)

    def measure_all(self, todo: list[Candidate]) -> list[Row]:
        """A row for every candidate, in order; those that `rows.jsonl` holds are not measured again."""
        file = self.directory / "rows.jsonl"
        kept, damaged = _read_rows(file)
        if damaged:
            self.progress.note(
                f"{file}: {damaged} damaged line{'s' if damaged > 1 else ''} left out and measured again"
            )
        done = {row.name: row for row in kept}
        same: dict[tuple | None, Row] = {}  # two candidates of equal specs are one model, measured once
        reference = None
        with self.progress.stage("evaluate", len(todo)) as step:
            for candidate in todo:
                specs = None if candidate.plan is None else tuple(candidate.plan.specs.items())
                if candidate.name not in done:
                    if candidate.plan is not None:
                        candidate.plan.write(self.directory / "plans" / f"{candidate.name.replace(' ', '_')}.json")
                    if specs in same:
                        row = _renamed(same[specs], candidate)
                    else:
                        reference = reference or self._reference()
                        row = self._measure(candidate, reference)
                    done[candidate.name] = row
                    _append(file, json.dumps(dataclasses.asdict(row)))
                    self.write_record()
                same.setdefault(specs, done[candidate.name])
                step(f"{candidate.name}: perplexity {done[candidate.name].perplexity:.4g}")
        return [done[candidate.name] for candidate in todo]

    def _reference(self) -> Reference:
        e = self.experiment.evaluation
        return make_reference(self.source, self.windows, batch_size=e.batch_size, dtype=_dtype(e.dtype))

    def _measure(self, candidate: Candidate, reference: Reference) -> Row:
        """Quantizes and evaluates one candidate, packed."""
        started = time.perf_counter()
        x, e, plan = self.experiment, self.experiment.evaluation, candidate.plan
        source = weighed = Weighed(self.source)
        if plan is not None:
            source, plan = self.pipeline.quantized(
                self.source,
                plan,
                self.calibration,
                batch_size=x.calibration.batch_size,
                cache=self.packed,
                note=self._note_once,
            )
        result = evaluate(
            source,
            self.windows,
            reference=reference,
            batch_size=e.batch_size,
            dtype=_dtype(e.dtype),
        )
        dense_bits = weighed.bits_per_weight(x.allocation.count) if plan is None else 0.0
        return Row(
            name=candidate.name,
            group=candidate.group,
            order=candidate.order,
            seed=candidate.seed,
            target_bpw=candidate.target_bpw,
            code_bits=dense_bits if plan is None else plan.code_bits,
            bpw=dense_bits if plan is None else plan.bpw,
            bytes_on_disk=None,
            bytes_on_device=weighed.nbytes if plan is None else plan.nbytes,
            perplexity=result.perplexity,
            kl=result.kl,
            top1=result.top1,
            bits_per_block=() if plan is None else plan.bits_per_block(),
            seconds=time.perf_counter() - started,
        )

    def _note_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.progress.note(line)

    def results(self, scores: dict, rows: list[Row]) -> Results:
        """Everything the report needs."""
        x, config, calibration = self.experiment, self.source.config, self.calibration
        a, q, taken = x.allocation, x.quantization, self.taken()
        tables = f"embedding {a.embedding_bits} bits, head {a.head_bits} bits"
        seeds = {
            "calibration seed": x.calibration.seed if calibration else None,
            "seeds of random orders": sorted({r.seed for r in rows if r.seed is not None}),
        }
        return Results(
            title=x.title,
            model={
                "name": x.model,
                "family": config.family,
                "blocks": config.num_blocks,
                "parameters": parameter_count(config),
                "fingerprint": self.fingerprint,
            },
            protocol={
                "corpus": Path(self.windows.source).name,
                "windows": len(self.windows.tokens),
                "window": x.evaluation.window,
                "stride": x.evaluation.stride or x.evaluation.window,
                "scored tokens": int(scored_targets(self.windows).sum()),
                "dtype": x.evaluation.dtype,
                "calibration": f"{Path(calibration.source).name}, {calibration.how}" if calibration else None,
            },
            quantizer={
                **self.pipeline.to_dict(),
                "group size": q.group_size or "column",
                "symmetric": q.symmetric,
                "scale dtype": q.scale_dtype,
                **({"zero dtype": q.zero_dtype} if q.zero_dtype else {}),
                **({"rank": q.rank} if q.rank else {}),
                "allocator": a.method,
                "bits": list(a.bits),
                "counted in bits per weight": f"{COUNTED[a.count]}; {tables}",
            },
            environment=describe_environment(taken["seconds"], taken["peak_memory_bytes"], seeds),
            scores={order: tuple(s.values.values()) for (order, _), s in scores.items() if is_score(order)},
            rows=tuple(rows),
            conclusion=conclude(rows),
        )


def _renamed(row: Row, candidate: Candidate) -> Row:
    """The measurement of a model under the name of another candidate that is the same model."""
    return dataclasses.replace(
        row,
        name=candidate.name,
        group=candidate.group,
        order=candidate.order,
        seed=candidate.seed,
        target_bpw=candidate.target_bpw,
    )


def _dtype(name: str) -> np.dtype:
    import jax.numpy as jnp

    return jnp.dtype(name)


def _read_record(file: Path) -> dict:
    """Raises UserError unless `file` holds a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged; remove {file.parent} or give another output")
    return found


def _read_rows(file: Path) -> tuple[list[Row], int]:
    """Rows measured so far, and how many lines hold none: those are dropped, and their models measured again.

    A crash cuts the last line short; a disk or an editor may have damaged any.
    """
    if not file.exists():
        return [], 0
    rows = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(Row.from_json(line))
    write_text(file, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    return rows, len(lines) - len(rows)


def _append(file: Path, line: str) -> None:
    with file.open("a") as f:
        f.write(line + "\n")
        f.flush()
        os.fsync(f.fileno())
