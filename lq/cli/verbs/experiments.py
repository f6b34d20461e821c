"""`lq demo` and `lq run`: a whole experiment from its config."""

from pathlib import Path
from typing import Annotated

import typer

from lq.cli.options import Quiet
from lq.cli.printing import terminal_width


def demo(
    out: Annotated[Path, typer.Option(help="Run directory; what an earlier demo left there is measured again.")] = Path(
        "runs/demo"
    ),
    quiet: Quiet = False,
) -> None:
    """The whole pipeline on the shipped model: a few minutes on two CPU cores."""
    from lq.assets import DEMO_CONFIG

    _experiment(DEMO_CONFIG, [], resume=False, overwrite=True, quiet=quiet, output=out)


def run(
    config: Annotated[Path, typer.Argument(help="Experiment config, YAML.", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, overrides the config.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the run directory holds.")] = False,
    quiet: Quiet = False,
) -> None:
    """An experiment: scores, plans, evaluations, report. Orders times budgets in the config are a sweep."""
    _experiment(config, set_ or [], resume=resume, overwrite=False, quiet=quiet)


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
