"""`lq score`."""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lq.cli.inputs import calibration_text, reads_text
from lq.cli.options import (
    Data,
    Length,
    Metrics,
    Model,
    Parts,
    Quiet,
    Samples,
    Seed,
    Settings,
    Top,
)
from lq.cli.printing import print_table
from lq.errors import UserError

if TYPE_CHECKING:
    from lq.importance import Scores


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
    parts: Parts = 1,
    top: Top = None,
    quiet: Quiet = False,
) -> None:
    """Importance of every block, larger deserves more bits; and how far several scores agree."""
    from lq.assets import resolve_model
    from lq.cli import arguments
    from lq.importance import score as score_source
    from lq.importance.agreement import parts_of
    from lq.models.loading import open_checkpoint
    from lq.progress import Progress
    from lq.runs.figures.scores import write_scores_figure

    metrics = _read(metric, arguments.settings(option))
    reading = [name for name, _ in metrics.values() if reads_text([name])]
    if not reading:
        arguments.refuse(context, [*arguments.TEXT, "parts"], f"{', '.join(metric)} reads no text")
    if len(metrics) == 1:
        arguments.refuse(context, ["parts", "top"], "one score alone agrees with none")
    arguments.check_directory(out, "--out")
    source = open_checkpoint(resolve_model(model))
    _check_top(top, metrics, source.config)
    windows = calibration_text(source, calibration, samples, length, seed) if reading else None
    texts = [windows, *parts_of(windows, parts)] if windows is not None and parts > 1 else [windows]
    results = {label: [] for label in metrics}
    with Progress(quiet=quiet).stage("score", sum(len(_texts(name, texts)) for name, _ in metrics.values())) as step:
        for label, (name, options) in metrics.items():
            for text in _texts(name, texts):
                results[label].append(score_source(source, name, text, options))
                step(label)
    whole = {label: found[0] for label, found in results.items()}
    files = {label: out / (re.sub(r"[^\w.=-]+", "_", label) + ".json") for label in whole}
    for label, scores in whole.items():
        scores.write(files[label])
    write_scores_figure(whole, out / "scores.png")
    _print_scores(whole)
    _print_agreement(results, top, seed)
    print(f"wrote {', '.join(map(str, files.values()))} and {out / 'scores.png'}")


def _read(items: list[str], shared: dict) -> dict[str, tuple[str, dict]]:
    """Item -> its metric and options. What cannot be is refused before any work."""
    from lq.cli import arguments
    from lq.importance import METRICS

    read = {}
    for item in items:
        name, options = arguments.named(item, "--metric")
        if (name, shared | options) in read.values():
            raise UserError(f"--metric {item}: given twice; leave one out")
        read[item] = name, shared | options
        METRICS.options(*read[item])
    return read


def _check_top(top: int | None, metrics: Mapping[str, tuple[str, dict]], config) -> None:
    """Raises UserError for more units than a metric will score."""
    from lq.cli import arguments
    from lq.importance import METRICS
    from lq.importance.units import units_of

    for label, (name, options) in metrics.items():
        given = METRICS.options(name, options)
        unit = getattr(given, "unit", "block")
        if unit == "segment":  # of which there are as many as the matrices' shapes allow
            continue
        count = len(units_of(config, arguments.unit(unit), tables=getattr(given, "tables", False)))
        if top is not None and top > count:
            raise UserError(f"--top {top}: {label} scores {count} units; write 1 to {count}")


def _texts(name: str, texts: list) -> list:
    """The whole text and its parts; of a metric that reads none the first alone."""
    return texts if reads_text([name]) else texts[:1]


def _print_scores(results: Mapping[str, "Scores"]) -> None:
    shown = lambda found, unit: f"{found.values[unit]:.6g}" if unit in found.values else ""  # noqa: E731
    units = dict.fromkeys(unit for found in results.values() for unit in found.values)
    print_table(["unit", *results], [[unit, *(shown(found, unit) for found in results.values())] for unit in units])


def _print_agreement(results: Mapping[str, list["Scores"]], top: int | None, seed: int) -> None:
    """Of every two scores of the same units; the whole text comes first in each list, then its parts."""
    from lq.importance.agreement import COVERED, agreement

    rows, apart = [], []
    for (a, first), (b, second) in itertools.combinations(results.items(), 2):
        if list(first[0].values) != list(second[0].values):
            apart.append(f"{a} and {b} score different units and are not compared")
            continue
        parts = (first[1:] or first, second[1:] or second) if len(first) > 1 or len(second) > 1 else None
        found = agreement(first[0], second[0], parts, top=top, seed=seed)
        if math.isnan(found.spearman):
            apart.append(f"{a} and {b} are not compared: one of them tells no units apart")
            continue
        spearman, common = f"{found.spearman:.3f}", f"{found.common} of {found.top}"
        if found.spearman_interval is not None and found.common_interval is not None:
            spearman += " ({:.3f} to {:.3f})".format(*found.spearman_interval)
            common += " ({:g} to {:g})".format(*found.common_interval)
        rows.append([a, b, spearman, common])
    if rows:
        print()
        print_table(["", "", "rank correlation", "most important in common"], rows)
        if (count := max(map(len, results.values())) - 1) > 0:
            print(f"in brackets {COVERED} % of a bootstrap over {count} parts of the text")
    for line in apart:
        print(line)
