"""`lq allocate` and `lq search`: a plan, from scores or by trying."""

from pathlib import Path
from typing import Annotated

import typer

from lq.cli.inputs import calibration_text, plan_of
from lq.cli.options import (
    Allocator,
    BitsList,
    Bpw,
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
    Quiet,
    Rank,
    Samples,
    ScaleDtype,
    Seed,
    Settings,
    Symmetric,
    ZeroDtype,
)
from lq.cli.printing import describe_plan


def allocate(
    context: typer.Context,
    scores: Annotated[Path, typer.Argument(help="A file made by lq score.", show_default=False)],
    bpw: Bpw = None,
    bytes_: Bytes = None,
    bits: BitsList = "2,4",
    method: Allocator = "rank",
    option: Settings = None,
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
    reverse: Annotated[bool, typer.Option("--reverse", help="The control: least important first.")] = False,
    out: Annotated[Path, typer.Option(help="The plan.")] = Path("plan.json"),
    picture: Annotated[Path | None, typer.Option(help="A PNG of which matrix got which bits.")] = None,
) -> None:
    """A width for every matrix so that a budget is met, from scores."""
    from lq.cli.arguments import Allocation, check_apart, check_file, settings
    from lq.importance import Scores
    from lq.importance import reverse as reversed_scores

    check_file(out, "--out")
    if picture is not None:
        check_file(picture, "--picture")
    check_apart({"the scores": scores, "--latency": latency, "--out": out, "--picture": picture})
    allocation = Allocation(context.params, method, settings(option))
    read = Scores.read(scores)
    plan = allocation.plan(reversed_scores(read) if reverse else read)
    if picture is not None:  # first, since what draws it may be missing
        from lq.runs.figures.plans import write_plan_figure

        write_plan_figure(plan, picture)
    plan.write(out)
    describe_plan(plan)
    print(f"wrote {out}")
    if picture is not None:
        print(f"wrote {picture}")


def search(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A file made by lq allocate: where it begins.", show_default=False)],
    bits: BitsList = "2,3,4",
    unit: Annotated[str, typer.Option(help="What changes width together: block, part, group or matrix.")] = "matrix",
    method: Annotated[
        str, typer.Option(help="See lq list searches; descent loses least with gptq, or rtn with importance=true.")
    ] = "evolution",
    option: Settings = None,
    quantizer: Annotated[str, typer.Option(help="What the candidates are made by; see lq list quantizers.")] = "rtn",
    quantizer_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for it; repeat for several.")] = None,
    calibration: Data = "standin",
    samples: Samples = 32,
    length: Length = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per device step.")] = 8,
    out: Annotated[Path, typer.Option(help="The plan that is found.")] = Path("plan.json"),
    quiet: Quiet = False,
) -> None:
    """A better plan of the same size, found by trying: widths are exchanged and the model is judged."""
    from lq.api import search as search_plan
    from lq.assets import resolve_model
    from lq.cli import arguments
    from lq.models.decoder import Decoder
    from lq.models.loading import open_checkpoint

    arguments.check_file(out, "--out")
    source = open_checkpoint(resolve_model(model))
    found = search_plan(
        Decoder(source.config),
        source.params(),
        plan_of(plan, source, model),
        calibration_text(source, calibration, samples, length, seed),
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
    describe_plan(found)
    print(f"{found.provenance['passes']:.1f} forward passes of the text")
    print(f"wrote {out}")
