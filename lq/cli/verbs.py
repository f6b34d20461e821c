"""The verbs of the `lq` command. Each is one library call; this file reads arguments and prints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lq.cli.app import command
from lq.cli.options import (
    WINDOW,
    AnyModel,
    BitsList,
    Bpw,
    Bytes,
    Costs,
    Count,
    Data,
    EmbeddingBits,
    GroupSize,
    HeadBits,
    Kind,
    Length,
    Metrics,
    Mixed,
    Model,
    Pins,
    Propagate,
    Quiet,
    Rank,
    Samples,
    ScaleDtype,
    Seed,
    Settings,
    Symmetric,
    Transforms,
    ZeroDtype,
)
from lq.cli.printing import cell, print_table, terminal_width
from lq.errors import UserError


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
    context: typer.Context,
    model: Model,
    metric: Metrics,
    out: Annotated[Path, typer.Option(help="Directory for METRIC.json and scores.png.")] = Path("scores"),
    calibration: Data = "standin",
    samples: Samples = 32,
    length: Length = None,
    seed: Seed = 0,
    option: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Importance of every block, larger deserves more bits."""
    from lq.assets import resolve_model
    from lq.cli import arguments
    from lq.importance import METRICS
    from lq.importance import score as score_source
    from lq.models.loading import open_checkpoint
    from lq.progress import Progress
    from lq.runs.figures.scores import write_scores_figure

    options = arguments.settings(option)
    for name in metric:  # what cannot be is refused before any work
        METRICS.options(name, options)
    if not _read_text(metric):
        arguments.refuse(context, arguments.TEXT, f"{', '.join(metric)} reads no text")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; give a directory")
    source = open_checkpoint(resolve_model(model))
    windows = _calibration(source, calibration, samples, length, seed) if _read_text(metric) else None
    results = {}
    with Progress(quiet=quiet).stage("score", len(metric)) as step:
        for name in metric:
            results[name] = score_source(source, name, windows, options)
            step(name)
    for name, scores in results.items():
        scores.write(out / f"{name}.json")
    write_scores_figure(results, out / "scores.png")
    shown = lambda found, unit: f"{found.values[unit]:.6g}" if unit in found.values else ""  # noqa: E731
    units = dict.fromkeys(unit for found in results.values() for unit in found.values)
    print_table(["unit", *results], [[unit, *(shown(found, unit) for found in results.values())] for unit in units])
    print(f"wrote {', '.join(str(out / f'{name}.json') for name in results)} and {out / 'scores.png'}")


@command
def allocate(
    context: typer.Context,
    scores: Annotated[Path, typer.Argument(help="A file made by lq score.", show_default=False)],
    bpw: Bpw = None,
    bytes_: Bytes = None,
    bits: BitsList = "2,4",
    method: Annotated[str, typer.Option(help="See lq list allocators.")] = "rank",
    costs: Costs = None,
    group_size: GroupSize = "128",
    symmetric: Symmetric = False,
    scale_dtype: ScaleDtype = "bfloat16",
    zero_dtype: ZeroDtype = None,
    rank: Rank = 0,
    mixed: Mixed = False,
    pin: Pins = None,
    embedding_bits: EmbeddingBits = 16,
    head_bits: HeadBits = 16,
    count: Count = "blocks",
    reverse: Annotated[bool, typer.Option("--reverse", help="The control: least important first.")] = False,
    out: Annotated[Path, typer.Option(help="The plan.")] = Path("plan.json"),
) -> None:
    """A width for every matrix so that a budget is met, from scores."""
    from lq.cli.arguments import Allocation
    from lq.importance import Scores
    from lq.importance import reverse as reversed_scores

    allocation = Allocation(context.params, method)
    read = Scores.read(scores)
    plan = allocation.plan(reversed_scores(read) if reverse else read)
    plan.write(out)
    _describe_plan(plan)
    print(f"wrote {out}")


@command
def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="A new directory for the checkpoint.", show_default=False)],
    plan: Annotated[Path | None, typer.Option(help="A file made by lq allocate; it decides all but --method.")] = None,
    bpw: Annotated[float | None, typer.Option(help="Instead of a plan: score and allocate here.")] = None,
    bytes_: Bytes = None,
    metric: Annotated[str, typer.Option(help="With --bpw or --bytes: whose order.")] = "lim",
    calibration: Data = "standin",
    samples: Samples = 32,
    length: Length = None,
    seed: Seed = 0,
    bits: Annotated[
        str, typer.Option(help="Widths to choose from, comma-separated. One alone needs no budget.")
    ] = "2,3,4",
    allocator: Annotated[str, typer.Option(help="See lq list allocators.")] = "rank",
    costs: Costs = None,
    group_size: GroupSize = "128",
    symmetric: Symmetric = False,
    scale_dtype: ScaleDtype = "bfloat16",
    zero_dtype: ZeroDtype = None,
    rank: Rank = 0,
    mixed: Mixed = False,
    pin: Pins = None,
    embedding_bits: EmbeddingBits = 16,
    head_bits: HeadBits = 16,
    count: Count = "blocks",
    method: Annotated[str, typer.Option(help="See lq list quantizers.")] = "rtn",
    option: Settings = None,
    transform: Transforms = None,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction", help="Undo the mean error of every matrix; gives biases to all.")
    ] = False,
    propagate: Propagate = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration windows per device step.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted write.")] = False,
    quiet: Quiet = False,
) -> None:
    """A packed checkpoint, written block by block; holds one block at a time."""
    from lq.assets import resolve_model
    from lq.checkpoint import check_output
    from lq.cli import arguments
    from lq.importance import METRICS
    from lq.importance import score as score_source
    from lq.models.loading import open_checkpoint
    from lq.pipeline import Pipeline

    options, transforms = arguments.settings(option), arguments.transforms(transform)
    pipeline = Pipeline.read(method, options, transforms, bias_correction, propagate)
    check_output(out, resume)
    reading = [metric] if plan is None and (bpw is not None or bytes_ is not None) else []
    if not pipeline.recipe.calibrated and not _read_text(reading):
        methods = " nor ".join([pipeline.name, *reading])
        who = f"neither {methods} reads text" if reading else f"{methods} reads no text"
        arguments.refuse(context, arguments.TEXT, who)
    allocation = None
    if plan is not None:
        arguments.refuse(context, arguments.PLAN, "--plan decides it")
        source = open_checkpoint(resolve_model(model))
        chosen = _read_plan(plan, source, model)
    else:
        allocation = arguments.Allocation(context.params, allocator)
        source = open_checkpoint(resolve_model(model))
        chosen = allocation.plan(score_source(source, "parameter_count"))  # a budget out of reach is so in any order
        if not reading:
            arguments.refuse(context, ["metric"], "without --bpw or --bytes nothing is scored")
    pipeline.check(source.config, chosen)
    windows = None
    if pipeline.recipe.calibrated or _read_text(reading):
        windows = _calibration(source, calibration, samples, length, seed)
    if allocation is not None and reading:
        METRICS.options(metric, {})
        chosen = allocation.plan(score_source(source, metric, windows))
    _write(source, chosen, out, pipeline, windows, batch_size, resume, quiet)


@command
def search(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A file made by lq allocate: where it begins.", show_default=False)],
    bits: BitsList = "2,3,4",
    unit: Annotated[str, typer.Option(help="What changes width together: block, part, group or matrix.")] = "matrix",
    method: Annotated[str, typer.Option(help="See lq list searches.")] = "evolution",
    option: Settings = None,
    quantizer: Annotated[str, typer.Option(help="What the candidates are made by; see lq list quantizers.")] = "rtn",
    quantizer_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for it; repeat for several.")] = None,
    calibration: Data = "standin",
    samples: Samples = 32,
    length: Length = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per device step, and of a batch of text.")] = 8,
    out: Annotated[Path, typer.Option(help="The plan that is found.")] = Path("plan.json"),
    quiet: Quiet = False,
) -> None:
    """A better plan of the same size, found by trying: widths are exchanged and the model is judged."""
    from lq.api import search as search_plan
    from lq.assets import resolve_model
    from lq.cli import arguments
    from lq.models.decoder import Decoder
    from lq.models.loading import open_checkpoint

    source = open_checkpoint(resolve_model(model))
    found = search_plan(
        Decoder(source.config),
        source.params(),
        _read_plan(plan, source, model),
        _calibration(source, calibration, samples, length, seed),
        bits=arguments.widths(bits),
        unit=arguments.unit(unit),
        method=method,
        options=arguments.settings(option),
        quantizer=quantizer,
        quantizer_options=arguments.settings(quantizer_option, "--quantizer-option"),
        batch_size=batch_size,
        quiet=quiet,
    )
    found.write(out)
    _describe_plan(found)
    print(f"{found.provenance['passes']:.1f} forward passes of the text")
    print(f"wrote {out}")


@command
def eval_(
    model: AnyModel,
    data: Data = "standin",
    window: Annotated[int | None, typer.Option(min=2, help=f"Tokens; {WINDOW}.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="The window when not given: no overlap.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="The first so many; all when not given.")] = None,
    original: Annotated[str | None, typer.Option(help="The model it was made of, for KL and top-1 agreement.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="Of the computation: float32, bfloat16, float16.")] = "float32",
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """Perplexity, and with --original KL divergence and top-1 agreement."""
    from lq.runs.single import evaluate_one

    if json_ is not None and json_.is_dir():
        raise UserError(f"--json {json_}: a directory; give a file")
    facts = evaluate_one(model, data, window, stride, windows, original, batch_size, dtype)
    print_table(["", ""], [[key, cell(value)] for key, value in facts.items()])
    if json_:
        import json

        from lq.atomic import write_text

        write_text(json_, json.dumps(facts, indent=1) + "\n")


@command
def generate(
    context: typer.Context,
    model: AnyModel,
    prompt: Annotated[list[str], typer.Option(help="Repeat for a batch.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: int = 0,
    kv_bits: Annotated[int, typer.Option(help="Key/value cache: 4 or 8, quantized (KIVI); 16, as computed.")] = 16,
) -> None:
    """Continues a prompt."""
    from lq.api import load, prepare
    from lq.cli import arguments
    from lq.models.generate import cache_nbytes, decode_continuation, kv_cache_spec
    from lq.models.generate import generate as continue_prompts

    cache = kv_cache_spec(kv_bits)  # refused before any work
    if temperature == 0.0:
        arguments.refuse(context, arguments.SAMPLING, "at temperature 0 nothing is drawn")
    decoder, params, tokenizer = load(model)
    params = prepare(params)
    prompts = [tokenizer(text)["input_ids"] for text in prompt]
    continuations = continue_prompts(
        decoder,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        kv_bits=kv_bits,
    )
    if cache is not None:
        sizes = [
            cache_nbytes(decoder, params, prompts, max_new_tokens=max_new_tokens, kv_bits=b) for b in (kv_bits, 16)
        ]
        print(f"key/value cache: {sizes[0]} bytes at {kv_bits} bits; {sizes[1]} as computed", file=sys.stderr)
        if max(map(len, prompts)) + max_new_tokens <= cache.residual:
            note = f"nothing was quantized: the newest {cache.residual} tokens stay as computed, and there were no more"
            print(note, file=sys.stderr)
    for text, ids, new in zip(prompt, prompts, continuations, strict=True):
        print(text + decode_continuation(tokenizer, ids, new))


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

    print_table(["name", "what it is", "options"], catalogue(kind.value))


@command
def version() -> None:
    """Versions, devices, and which matmul backends this installation has."""
    from lq.runs.environment import device_name, versions
    from lq_kernels.cpu import status
    from lq_kernels.devices import default_platform
    from lq_kernels.registry import automatic

    for name, number in versions().items():
        print(f"{name:13} {number}")
    print(f"{'device':13} {device_name()}")
    platform = default_platform()
    print(f"{'products':13} {', '.join(automatic(platform))}: the first that can, on {platform}")
    print(f"{'C++ on CPU':13} {status()}")


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
    print(format_table([(experiment.title, results)], width=terminal_width()))
    print(f"report: {Path(experiment.output) / 'report.html'}")
    print(results.conclusion)


def _calibration(source, data: str, samples: int, length: int | None, seed: int):
    """Windows to calibrate on."""
    from lq.api import calibration_windows
    from lq.calibration.stream import window_for
    from lq.models.loading import load_tokenizer

    tokenizer, length = load_tokenizer(source.path), window_for(source.config, length)
    return calibration_windows(tokenizer, data, samples=samples, length=length, seed=seed)


def _read_text(metrics: list[str]) -> bool:
    """Whether one of the metrics looks at calibration text."""
    from lq.importance import METRICS

    return any("calibration" in METRICS[name].needs for name in metrics)


def _read_plan(path: Path, source, model: str):
    from lq.allocation import Plan
    from lq.models.fingerprint import fingerprint

    plan = Plan.read(path)
    if plan.model != fingerprint(source):
        raise UserError(f"{path}: a plan of another model; make one from the scores of {model}")
    return plan


def _write(source, plan, out: Path, pipeline, windows, batch_size: int, resume: bool, quiet: bool) -> None:
    from lq.checkpoint import write_quantized
    from lq.models.source import part_names
    from lq.progress import Progress
    from lq.quantizers import described

    progress = Progress(quiet=quiet)
    packed, plan = pipeline.quantized(source, plan, windows, batch_size=batch_size, note=progress.note)
    quantized = {path.split("/")[0] for path in plan.specs}
    with progress.stage(f"quantize ({pipeline.name})", len(part_names(source))) as step:
        write_quantized(
            packed,
            plan,
            out,
            quantizer=pipeline.record(windows, batch_size),
            description=source.path,
            resume=resume,
            on_part=lambda part: step(described(packed, part), light=part not in quantized),
            on_kept=lambda part: step(f"{part}, kept", light=True),
        )
    _describe_plan(plan)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"wrote {out}: {size} bytes of shards, {size - plan.nbytes} of them headers")


def _describe_plan(plan) -> None:
    from lq.runs.weighed import COUNTED

    print(f"{plan.bpw:.4f} bits per weight, {plan.code_bits:.4f} code bits, over {COUNTED[plan.count]}")
    print(f"{plan.nbytes} bytes for the whole model")
    print("bits per block: " + " ".join(f"{b:g}" for b in plan.bits_per_block()))
    for pattern in plan.provenance.get("unused_pins", []):
        print(f"pin {pattern!r} matches no matrix", file=sys.stderr)
    for pattern in plan.provenance.get("shadowed_pins", []):
        print(f"pin {pattern!r} matches only matrices that an earlier pin decides", file=sys.stderr)
