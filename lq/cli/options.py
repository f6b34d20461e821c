"""The options that several verbs share, with their help."""

import enum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A directory in Hugging Face layout, a hub name, or 'standin'.", show_default=False)
]
AnyModel = Annotated[
    str, typer.Argument(help="As for MODEL elsewhere, or a directory made by lq quantize.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Data = Annotated[str, typer.Option(help="Text file or directory, wikitext2, c4, or 'standin' (the shipped text).")]
WINDOW = "512 when not given, or the model's context if that is less"
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(min=2, help=f"Tokens per window; {WINDOW}.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the places the windows are cut at.")]
Metrics = Annotated[
    list[str],
    typer.Option("--metric", help="NAME or NAME:KEY=VALUE,...; repeat for several; see lq list importance."),
]
Bpw = Annotated[float | None, typer.Option(help="Bits per weight, scales and zero points included.")]
Bytes = Annotated[int | None, typer.Option("--bytes", help="Bytes of the counted matrices instead.")]
BitsList = Annotated[str, typer.Option("--bits", help="Widths to choose from, comma-separated.")]
GroupSize = Annotated[
    str, typer.Option(help="Input channels per scale: 32, 64, 128, 256 or column; several to choose from.")
]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
ScaleDtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
ZeroDtype = Annotated[
    str | None, typer.Option(help="Zero points that need not be whole (HQQ's): bfloat16, float16 or float32.")
]
Rank = Annotated[int, typer.Option(min=0, help="Of a low-rank residual in 8 bits beside the codes (LoRC); 0: none.")]
Mixed = Annotated[
    bool,
    typer.Option("--mixed", help="Widths of their own for runs of 128 input channels, the plan's on average (BAQ)."),
]
ByEnergy = Annotated[
    bool,
    typer.Option("--by-energy", help="Groups of channels in the order of their energy (gptq, rsq, rtn)."),
]
Transforms = Annotated[
    list[str] | None,
    typer.Option("--transform", help="NAME or NAME:KEY=VALUE,..., see lq list transforms; repeat in order."),
]
Propagate = Annotated[
    bool | None,
    typer.Option(
        "--propagate/--no-propagate",
        help="Calibrate every block on quantized states, or on the original's; as is usual for the method.",
        show_default=False,
    ),
]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help="REGEX=BITS for matrices that match; 16 leaves them dense.")
]
EmbeddingBits = Annotated[int, typer.Option(help="1 to 8, or 16 for dense.")]
HeadBits = Annotated[int, typer.Option(help="Of an untied head; 1 to 8, or 16 for dense.")]
Costs = Annotated[
    str | None,
    typer.Option(help="What a unit is taken to lose: measured (when not given, if it was), by its place, or by value."),
]
Count = Annotated[str, typer.Option(help="What the average is over: blocks, or all (embedding and head too).")]
Parts = Annotated[
    int, typer.Option(min=1, help="Of the text, each scored for itself too, for intervals of the agreement.")
]
Top = Annotated[int | None, typer.Option(min=1, help="So many most important units are compared; a quarter of them.")]
LatencyTable = Annotated[
    Path | None,
    typer.Option("--latency", help="JSON: matrix -> option -> seconds; with --max-latency."),
]
MaxLatency = Annotated[float | None, typer.Option(help="Seconds that the matrices which are free may take together.")]
Allocator = Annotated[str, typer.Option(help="See lq list allocators; only quadratic uses interactions of scores.")]
AllocatorSettings = Annotated[
    list[str] | None, typer.Option("--allocator-option", help="KEY=VALUE for the allocator; repeat for several.")
]
Settings = Annotated[list[str] | None, typer.Option("--option", help="KEY=VALUE for the method; repeat for several.")]


class Kind(enum.StrEnum):
    importance = "importance"
    allocators = "allocators"
    searches = "searches"
    quantizers = "quantizers"
    formats = "formats"
    transforms = "transforms"
    models = "models"
