"""One experiment from config to results: score, allocate, quantize, evaluate, for every order and budget of the sweep.

What it leaves in its directory, and how it goes on there after an interruption: `lq.runs.journal`.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lq.allocation import Plan
from lq.assets import resolve_data, resolve_model
from lq.atomic import write_text
from lq.calibration.data import Windows, calibration_windows, evaluation_windows
from lq.calibration.stream import check_context
from lq.checkpoint import open_quantized
from lq.errors import UserError
from lq.evaluation import Reference, evaluate, make_reference, scored_targets
from lq.importance import METRICS, Scores, reverse, score
from lq.models.fingerprint import fingerprint
from lq.models.loading import MANIFEST, load_tokenizer, open_checkpoint
from lq.models.matrices import parameter_count
from lq.models.source import ParameterSource
from lq.processes import is_first
from lq.progress import Progress, clock
from lq.runs.candidates import Candidate, candidates, check_budgets, orders_of
from lq.runs.conclusion import conclude, is_score
from lq.runs.config import BATCH_SIZE, Experiment, Order, at, dump_experiment
from lq.runs.environment import describe_environment
from lq.runs.journal import Journal
from lq.runs.results import Results, Row
from lq.runs.weighed import COUNTED, Weighed
from lq.version import code_version

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
      UserError: the directory is of another experiment or of other code, or holds this one and neither `resume` nor
        `overwrite` is set, or another process writes to it.
    """
    progress = progress or Progress(quiet=True)
    with at(experiment.file):
        run = Run(experiment, progress)
        opened = Journal.opened(run.directory, run.identity(), resume=resume, overwrite=overwrite, progress=progress)
        with _claimed(opened, run.directory) as journal:
            return _carry_out(run, journal)


@contextlib.contextmanager
def _claimed(opened: contextlib.AbstractContextManager[Journal], directory: Path) -> Iterator[Journal]:
    """The journal; that it cannot be opened is said of the config's `output`."""
    with contextlib.ExitStack() as stack:
        with at("output"):
            try:
                journal = stack.enter_context(opened)
            except OSError as error:
                raise UserError(f"{directory}: cannot be written ({error.strerror}); give another output") from error
        yield journal


def _carry_out(run: "Run", journal: Journal) -> Results:
    experiment = run.experiment
    if is_first():
        write_text(journal.directory / "config.yaml", dump_experiment(experiment))
    scores = run.scores(journal)
    todo = list(candidates(experiment, run.source.config, run.fingerprint, scores))
    for pattern in dict.fromkeys(p for c in todo if c.plan for p in c.plan.provenance.get("unused_pins", [])):
        run.progress.note(f"pin {pattern!r} matches no matrix")
    rows = run.measure_all(todo, journal)
    journal.complete(rows)
    results = run.results(scores, rows)
    if is_first():
        results.write(journal.directory / "results.json")
        from lq.runs.report import write_report

        write_report([(experiment.title, results)], journal.directory)
    journal.record()
    run.progress.note(f"took {clock(journal.seconds)}, {journal.peak_memory_bytes / 1e9:.1f} GB at the most")
    return results


class Run:
    """The state of one experiment: what is open and where it is kept."""

    def __init__(self, experiment: Experiment, progress: Progress):
        self.experiment, self.progress = experiment, progress
        self.directory = Path(experiment.output)
        with at("model"):
            self.source = open_checkpoint(resolve_model(experiment.model))
            self.fingerprint = fingerprint(self.source)
        check_budgets(experiment, self.source.config)
        self.calibration, self.windows = self._cut_windows()
        self.pipeline = experiment.quantization.pipeline
        self.packed = {} if 2 * parameter_count(self.source.config) < CACHE_LIMIT else None
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

    def identity(self) -> dict:
        """What tells this experiment from any other. Where it is written does not, and its title only from others."""
        config = self.experiment.model_dump(exclude={"output", "title"})
        calibration = self.calibration.fingerprint if self.calibration else None
        text = json.dumps([config, self.fingerprint, calibration, self.windows.fingerprint])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {
            "title": self.experiment.title,
            "experiment": digest,
            "model": self.fingerprint,
            "code": code_version(),
        }

    def scores(self, journal: Journal) -> dict[tuple[str, int | None], Scores]:
        """Every order of the config, by (order name, seed), computed once, and not again where `journal` holds it."""
        found = {}
        straight: dict[tuple[str, int | None], Scores] = {}  # an order and its reverse are one computation
        wanted = [(order, seed) for order in orders_of(self.experiment) for seed in order.each_seed()]
        with self.progress.stage("score", len(wanted)) as step:
            for order, seed in wanted:
                key, measured = (order.name, seed), (order.name.removeprefix("reverse "), seed)
                name = order.name.replace(" ", "_") + ("" if seed is None else f"_{seed}")
                file = f"scores/{name}.json"
                if key not in found and (kept := journal.kept(Scores, file)) is not None:
                    found[key] = kept
                    if not order.reverse:
                        straight[measured] = kept
                elif key not in found:
                    if measured not in straight:
                        straight[measured] = self._score(order, seed)
                    found[key] = reverse(straight[measured]) if order.reverse else straight[measured]
                    journal.write(file, found[key])
                step(order.name)
        return found

    def _score(self, order: Order, seed: int | None) -> Scores:
        """The scores of an order's metric, not reversed; the calibration's batch size unless the order has its own."""
        options = order.options if seed is None else {**order.options, "seed": seed}
        if any(field.name == BATCH_SIZE for field in dataclasses.fields(METRICS[order.metric].options)):
            options = {BATCH_SIZE: self.experiment.calibration.batch_size, **options}
        return score(self.source, order.metric, self.calibration, options)

    def measure_all(self, todo: list[Candidate], journal: Journal) -> list[Row]:
        """A row for every candidate, in order; those that `journal` holds are not measured again."""
        done = {row.name: row for row in journal.rows()}
        same: dict[tuple | None, Row] = {}  # two candidates of equal specs are one model, measured once
        reference = None
        with self.progress.stage("evaluate", len(todo)) as step:
            for candidate in todo:
                specs = None if candidate.plan is None else tuple(candidate.plan.specs.items())
                plan = f"plans/{candidate.name.replace(' ', '_')}.json"
                if candidate.plan is not None and journal.kept(Plan, plan) is None:
                    journal.write(plan, candidate.plan)
                if candidate.name not in done:
                    started = time.perf_counter()
                    if specs in same:
                        row = _renamed(same[specs], candidate)
                    else:
                        reference = reference or self._reference()
                        row = self._measure(candidate, reference)
                    done[candidate.name] = row
                    journal.add(row, time.perf_counter() - started)
                    self._remove_unfinished(candidate)
                same.setdefault(specs, done[candidate.name])
                step(f"{candidate.name}: perplexity {done[candidate.name].perplexity:.4g}")
        return [done[candidate.name] for candidate in todo]

    def _reference(self) -> Reference:
        e = self.experiment.evaluation
        return make_reference(self.source, self.windows, batch_size=e.batch_size, dtype=_dtype(e.dtype))

    def _measure(self, candidate: Candidate, reference: Reference) -> Row:
        """Quantizes and evaluates one candidate, packed."""
        x, e, plan = self.experiment, self.experiment.evaluation, candidate.plan
        source = weighed = Weighed(self.source)
        if plan is not None:
            source, plan = self._quantized(candidate.name, plan)
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
        )

    def _quantized(self, name: str, plan: Plan) -> tuple[ParameterSource, Plan]:
        """The model packed by `plan`, and the plan as it is true of it.

        With `save_blocks` it is written block by block, so that an interruption costs a block and not all of it.
        """
        batch_size, save = self.experiment.calibration.batch_size, self.experiment.save_blocks
        if save is None:
            save = self.packed is None and self.pipeline.recipe.calibrated
        if not save:
            return self.pipeline.quantized(
                self.source, plan, self.calibration, batch_size=batch_size, cache=self.packed, note=self._note_once
            )
        out = self._unfinished(name)
        if not (out / MANIFEST).exists():
            self.pipeline.write(self.source, plan, out, self.calibration, batch_size=batch_size, resume=out.exists())
        written = open_quantized(out)
        return written, written.plan

    def _unfinished(self, name: str) -> Path:
        return self.directory / "unfinished" / name.replace(" ", "_")

    def _remove_unfinished(self, candidate: Candidate) -> None:
        if is_first():
            shutil.rmtree(self._unfinished(candidate.name), ignore_errors=True)
            with contextlib.suppress(OSError):  # not there, or that of another is
                (self.directory / "unfinished").rmdir()

    def _note_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.progress.note(line)

    def results(self, scores: dict, rows: list[Row]) -> Results:
        """Everything the report needs."""
        x, config, calibration = self.experiment, self.source.config, self.calibration
        a, q = x.allocation, x.quantization
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
            environment=describe_environment(seeds),
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
