"""The `lq` command. Every verb is one library call; this file reads arguments and prints.

A mistake of the user's is one line on standard error and exit status 2. Anything else is a defect and keeps its
traceback (status 1). Ctrl-C exits with 130.
"""

import enum
import functools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lq.errors import UserError

# The hub library is used for configs and tokenizers alone; its advice to install torch is of no use here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    help="Layer-wise low-bit quantization of language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(help="A directory in Hugging Face layout, a hub name, or 'standin'.", show_default=False)
]
AnyModel = Annotated[
    str, typer.Argument(help="As for MODEL elsewhere, or a directory made by lq quantize.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Data = Annotated[str, typer.Option(help="Text file or directory, wikitext2, c4, or 'standin' (the shipped text).")]
Metrics = Annotated[list[str], typer.Option("--metric", help="Repeat for several; see lq list importance.")]
BitsList = Annotated[str, typer.Option("--bits", help="Widths to choose from, comma-separated.")]
GroupSize = Annotated[str, typer.Option(help="Input channels per scale: 32, 64, 128, 256 or column.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
ScaleDtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help="REGEX=BITS for matrices that match; 16 leaves them dense.")
]
Settings = Annotated[list[str] | None, typer.Option("--option", help="KEY=VALUE for the method; repeat for several.")]


class Kind(enum.StrEnum):
    importance = "importance"
    allocators = "allocators"
    quantizers = "quantizers"
    formats = "formats"
    transforms = "transforms"
    models = "models"


def command(function):
    """Registers a verb and turns what it may raise into exit statuses."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(f"lq: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:  # a path of the user's that cannot be read or written
            print(f"lq: {error.filename or error}: {error.strerror or 'cannot be used'}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            again = " ".join(["lq", *sys.argv[1:]])
            resumable = function.__name__ in ("run", "quantize") and "--resume" not in sys.argv
            hint = f"; go on with: {again} --resume" if resumable else ""
            print(f"\nlq: interrupted{hint}", file=sys.stderr)
            raise typer.Exit(130) from None

    return app.command(name=function.__name__.rstrip("_"))(run)


@command
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; what an earlier demo left there is measured again.")] = Path(
        "runs/demo"
    ),
    quiet: Quiet = False,
) -> None:
    """The whole pipeline on the shipped model: a few minutes on two CPU cores."""
    from lq.assets import DEMO_CONFIG

    _experiment(DEMO_CONFIG, [], resume=False, overwrite=True, quiet=quiet, output=out)


@command
def run(
    config: Annotated[Path, typer.Argument(help="Experiment config, YAML.", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, overrides the config.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the run directory holds.")] = False,
    quiet: Quiet = False,
) -> None:
    """An experiment: scores, plans, evaluations, report. Orders times budgets in the config are a sweep."""
    _experiment(config, set_ or [], resume=resume, overwrite=False, quiet=quiet)


@command
def score(
    model: Model,
    metric: Metrics,
    out: Annotated[Path, typer.Option(help="Directory for METRIC.json and scores.png.")] = Path("scores"),
    calibration: Data = "standin",
    samples: Annotated[int, typer.Option(min=1)] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    option: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Importance of every block, larger deserves more bits."""
    from lq.api import calibration_windows, open_model
    from lq.importance import METRICS
    from lq.importance import score as score_source
    from lq.models.loading import load_tokenizer
    from lq.progress import Progress
    from lq.runs.figures.scores import write_scores_figure

    methods = {name: METRICS[name] for name in metric}  # unknown names are refused before any work
    source = open_model(model)
    windows = None
    if any("calibration" in method.needs for method in methods.values()):
        windows = calibration_windows(
            load_tokenizer(source.path), calibration, samples=samples, length=length, seed=seed
        )
    results = {}
    with Progress(quiet=quiet).stage("score", len(methods)) as step:
        for name in methods:
            results[name] = score_source(source, name, windows, _settings(option))
            results[name].write(out / f"{name}.json")
            step(name)
    write_scores_figure(results, out / "scores.png")
    _table(
        ["block", *results], [[unit, *(f"{s.values[unit]:.6g}" for s in results.values())] for unit in _units(results)]
    )
    print(f"wrote {', '.join(str(out / f'{name}.json') for name in results)} and {out / 'scores.png'}")


@command
def allocate(
    scores: Annotated[Path, typer.Argument(help="A file made by lq score.", show_default=False)],
    bpw: Annotated[float | None, typer.Option(help="Bits per weight, scales and zero points included.")] = None,
    bytes_: Annotated[int | None, typer.Option("--bytes", help="Bytes of the counted matrices instead.")] = None,
    bits: BitsList = "2,4",
    method: Annotated[str, typer.Option(help="See lq list allocators.")] = "rank",
    group_size: GroupSize = "128",
    symmetric: Symmetric = False,
    scale_dtype: ScaleDtype = "bfloat16",
    pin: Pins = None,
    embedding_bits: Annotated[int, typer.Option(help="1 to 8, or 16 for dense.")] = 16,
    head_bits: Annotated[int, typer.Option(help="Of an untied head; 1 to 8, or 16 for dense.")] = 16,
    count: Annotated[
        str, typer.Option(help="What the average is over: blocks, or all (embedding and head too).")
    ] = "blocks",
    reverse: Annotated[bool, typer.Option("--reverse", help="The control: least important first.")] = False,
    out: Annotated[Path, typer.Option(help="The plan.")] = Path("plan.json"),
) -> None:
    """A width for every matrix so that a budget is met, from scores."""
    from lq.importance import Scores
    from lq.importance import reverse as reversed_scores

    read = Scores.read(scores)
    spec = _spec(group_size, symmetric, scale_dtype)
    plan = _plan(
        reversed_scores(read) if reverse else read,
        spec,
        bpw,
        bytes_,
        bits,
        method,
        pin,
        embedding_bits,
        head_bits,
        count,
    )
    plan.write(out)
    _describe_plan(plan)
    print(f"wrote {out}")


@command
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="A new directory for the checkpoint.", show_default=False)],
    plan: Annotated[Path | None, typer.Option(help="A file made by lq allocate.")] = None,
    bpw: Annotated[float | None, typer.Option(help="Instead of a plan: score and allocate here.")] = None,
    metric: Annotated[str, typer.Option(help="With --bpw: whose order.")] = "lim",
    calibration: Data = "standin",
    bits: BitsList = "2,3,4",
    group_size: GroupSize = "128",
    symmetric: Symmetric = False,
    method: Annotated[str, typer.Option(help="See lq list quantizers.")] = "rtn",
    option: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted write.")] = False,
    quiet: Quiet = False,
) -> None:
    """A packed checkpoint, written block by block; holds one block at a time."""
    from lq.allocation import Plan
    from lq.models.fingerprint import fingerprint
    from lq.models.loading import open_checkpoint
    from lq.quantizers import QUANTIZERS

    options = QUANTIZERS.options(method, _settings(option))
    if (plan is None) == (bpw is None):
        raise UserError("quantize: give --plan plan.json, or --bpw 3.0 to score and allocate here, one of the two")
    from lq.assets import resolve_model

    check = QUANTIZERS[method].check or (lambda options, spec: None)
    source = open_checkpoint(resolve_model(model))
    if plan is not None:
        chosen = Plan.read(plan)
        for spec in set(chosen.specs.values()):
            check(options, spec)
        if chosen.model != fingerprint(source):
            raise UserError(f"{plan}: a plan of another model; make one from the scores of {model}")
    else:
        check(options, _spec(group_size, symmetric, "bfloat16"))
        scores = _score_here(source, metric, calibration)
        chosen = _plan(
            scores, _spec(group_size, symmetric, "bfloat16"), bpw, None, bits, "rank", None, 16, 16, "blocks"
        )
    _write(source, chosen, out, method, options, resume, quiet)


@command
def eval_(
    model: AnyModel,
    data: Data = "standin",
    window: Annotated[int, typer.Option(min=2, help="Tokens.")] = 512,
    stride: Annotated[int | None, typer.Option(min=1, help="The window when not given: no overlap.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="The first so many; all when not given.")] = None,
    original: Annotated[str | None, typer.Option(help="The model it was made of, for KL and top-1 agreement.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="Of the computation: float32, bfloat16, float16.")] = "float32",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """Perplexity, and with --original KL divergence and top-1 agreement."""
    from lq.runs.single import evaluate_one

    facts = evaluate_one(model, data, window, stride, windows, original, batch_size, dtype)
    _table(["", ""], [[key, _cell(value)] for key, value in facts.items()])
    if json_:
        import json

        from lq.atomic import write_text

        write_text(json_, json.dumps(facts, indent=1) + "\n")


@command
def generate(
    model: AnyModel,
    prompt: Annotated[list[str], typer.Option(help="Repeat for a batch.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: int = 0,
) -> None:
    """Continues a prompt."""
    from lq.api import load
    from lq.models.generate import generate as continue_prompts

    decoder, params, tokenizer = load(model)
    continuations = continue_prompts(
        decoder,
        params,
        [tokenizer(text)["input_ids"] for text in prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for text, ids in zip(prompt, continuations, strict=True):
        print(text + tokenizer.decode(ids, skip_special_tokens=True))


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory for report.html, report.png and results.csv.")] = Path("report"),
) -> None:
    """One self-contained page with tables and plots, comparing several runs."""
    from lq.runs.report import write_report
    from lq.runs.results import Results

    page = write_report([(str(run), Results.read(run / "results.json")) for run in runs], out)
    print(f"wrote {page}")


@command
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)]) -> None:
    """What there is: methods by their literature names, number formats, model families."""
    from lq.catalogue import catalogue

    rows = catalogue(kind.value)
    if rows:
        _table(["name", "what it is", "options"], rows)
    else:
        print(f"this version of lq has no {kind.value}")


@command
def version() -> None:
    """Versions, devices, and which matmul backends this installation has."""
    from lq.runs.environment import device_name, versions
    from lq_kernels import BACKENDS

    for name, number in versions().items():
        print(f"{name:13} {number}")
    print(f"{'device':13} {device_name()}")
    print(f"{'backends':13} {', '.join(BACKENDS)}")


def _experiment(
    config: Path, overrides: list[str], *, resume: bool, overwrite: bool, quiet: bool, output: Path | None = None
) -> None:
    from lq.progress import Progress
    from lq.runs.config import load_experiment
    from lq.runs.experiment import run_experiment
    from lq.runs.tables import format_table

    experiment = load_experiment(config, overrides)
    if output is not None:
        experiment = experiment.model_copy(update={"output": str(output)})
    results = run_experiment(experiment, resume=resume, overwrite=overwrite, progress=Progress(quiet=quiet))
    print(format_table([(experiment.title, results)], width=_width()))
    print(f"report: {Path(experiment.output) / 'report.html'}")
    print(results.conclusion)


def _score_here(source, metric: str, calibration: str):
    from lq.api import calibration_windows
    from lq.importance import METRICS
    from lq.importance import score as score_source
    from lq.models.loading import load_tokenizer

    windows = None
    if "calibration" in METRICS[metric].needs:
        length = min(512, source.config.max_positions)
        windows = calibration_windows(load_tokenizer(source.path), calibration, samples=32, length=length)
    return score_source(source, metric, windows)


def _write(source, plan, out: Path, method: str, options, resume: bool, quiet: bool) -> None:
    import dataclasses

    from lq.checkpoint import write_quantized
    from lq.checkpoint.write import part_names
    from lq.progress import Progress
    from lq.quantizers import PlannedSource

    planned = PlannedSource(source, plan.specs, method, options)
    record = {"method": method, "options": dataclasses.asdict(options)}
    with Progress(quiet=quiet).stage("quantize", len(part_names(source))) as step:
        write_quantized(planned, plan, out, quantizer=record, description=source.path, resume=resume, on_part=step)
    _describe_plan(plan)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"wrote {out}: {size} bytes of shards, {size - plan.nbytes} of them headers")


def _plan(scores, spec, bpw, nbytes, bits: str, method: str, pins, embedding_bits: int, head_bits: int, count: str):
    from lq.allocation import allocate as allocate_scores
    from lq.allocation.allocate import Pin

    try:
        widths = [int(b) for b in bits.split(",")]
    except ValueError:
        raise UserError(f"--bits {bits}: write widths like 2,3,4") from None
    rules = []
    for text in pins or []:
        pattern, separator, width = text.rpartition("=")
        if not separator or not width.isdigit():
            raise UserError(f"--pin {text}: write REGEX=BITS, for example 'down_proj=4'")
        rules.append(Pin(pattern=pattern, bits=int(width)))
    if count not in ("blocks", "all"):
        raise UserError(f"--count {count}: write blocks or all")
    return allocate_scores(
        scores,
        bpw=bpw,
        nbytes=nbytes,
        bits=widths,
        spec=spec,
        method=method,
        pins=rules,
        embedding_bits=embedding_bits,
        head_bits=head_bits,
        count=count,
    )


def _spec(group_size: str, symmetric: bool, scale_dtype: str):
    from lq.numerics.spec import QuantSpec

    if group_size != "column" and not group_size.isdigit():
        raise UserError(f"--group-size {group_size}: write 32, 64, 128, 256 or column")
    size = None if group_size == "column" else int(group_size)
    return QuantSpec(bits=8, group_size=size, symmetric=symmetric, scale_dtype=scale_dtype)


def _describe_plan(plan) -> None:
    what = "the blocks' matrices" if plan.count == "blocks" else "the blocks' matrices, embedding and head"
    print(f"{plan.bpw:.4f} bits per weight, {plan.code_bits:.4f} code bits, over {what}; {plan.nbytes} bytes in all")
    print("bits per block: " + " ".join(f"{b:g}" for b in plan.bits_per_block()))
    for pattern in plan.provenance.get("unused_pins", []):
        print(f"pin {pattern!r} matches no matrix", file=sys.stderr)


def _settings(items: list[str] | None) -> dict:
    """`key=value` items; values are read as YAML, so 3 is a number and true a truth value."""
    import yaml

    settings = {}
    for item in items or []:
        key, separator, value = item.partition("=")
        if not separator:
            raise UserError(f"--option {item}: write KEY=VALUE")
        settings[key] = yaml.safe_load(value)
    return settings


def _units(results) -> list[str]:
    return list(next(iter(results.values())).values)


def _cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def _table(header: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns, two blanks apart."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows] if any(header) else rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
