"""`lq quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from lq.cli.inputs import calibration_text, plan_of, reads_text
from lq.cli.options import (
    Allocator,
    AllocatorSettings,
    ByEnergy,
    Bytes,
    Costs,
    Count,
    Data,
    EmbeddingBits,
    GroupSize,
    HeadBits,
    LatencyTable,
    Length,
    MaxLatency,
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
from lq.cli.printing import describe_plan


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
    allocator: Allocator = "rank",
    allocator_option: AllocatorSettings = None,
    costs: Costs = None,
    group_size: GroupSize = "128",
    symmetric: Symmetric = False,
    scale_dtype: ScaleDtype = "bfloat16",
    zero_dtype: ZeroDtype = None,
    rank: Rank = 0,
    mixed: Mixed = False,
    by_energy: ByEnergy = False,
    pin: Pins = None,
    embedding_bits: EmbeddingBits = 16,
    head_bits: HeadBits = 16,
    count: Count = "blocks",
    latency: LatencyTable = None,
    max_latency: MaxLatency = None,
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
    from lq.progress import Progress

    options, transforms = arguments.settings(option), arguments.transforms(transform)
    pipeline = Pipeline.read(method, options, transforms, bias_correction, propagate)
    check_output(out, resume)
    reading = [metric] if plan is None and (bpw is not None or bytes_ is not None) else []
    if not pipeline.recipe.calibrated and not reads_text(reading):
        methods = " nor ".join([pipeline.name, *reading])
        who = f"neither {methods} reads text" if reading else f"{methods} reads no text"
        arguments.refuse(context, arguments.TEXT, who)
    allocation = None
    if plan is not None:
        arguments.refuse(context, arguments.PLAN, "--plan decides it")
        source = open_checkpoint(resolve_model(model))
        chosen = plan_of(plan, source, model)
    else:
        allocation = arguments.Allocation(
            context.params, allocator, arguments.settings(allocator_option, "--allocator-option")
        )
        source = open_checkpoint(resolve_model(model))
        chosen = allocation.plan(score_source(source, "parameter_count"))  # a budget out of reach is so in any order
        if not reading:
            arguments.refuse(context, ["metric"], "without --bpw or --bytes nothing is scored")
    pipeline.check(source.config, chosen)
    windows = None
    if pipeline.recipe.calibrated or reads_text(reading):
        windows = calibration_text(source, calibration, samples, length, seed)
    if allocation is not None and reading:
        METRICS.options(metric, {})
        chosen = allocation.plan(score_source(source, metric, windows))
    progress = Progress(quiet=quiet)
    chosen = pipeline.write(source, chosen, out, windows, batch_size=batch_size, resume=resume, progress=progress)
    describe_plan(chosen)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"wrote {out}: {size} bytes of shards, {size - chosen.nbytes} of them headers")
