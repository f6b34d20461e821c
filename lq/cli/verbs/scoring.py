"""`lq score`."""

from pathlib import Path
from typing import Annotated

import typer

from lq.cli.inputs import calibration_text, reads_text
from lq.cli.options import (
    Data,
    Length,
    Metrics,
    Model,
    Quiet,
    Samples,
    Seed,
    Settings,
)
from lq.cli.printing import print_table
from lq.errors import UserError


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
    if not reads_text(metric):
        arguments.refuse(context, arguments.TEXT, f"{', '.join(metric)} reads no text")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; give a directory")
    source = open_checkpoint(resolve_model(model))
    windows = calibration_text(source, calibration, samples, length, seed) if reads_text(metric) else None
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
