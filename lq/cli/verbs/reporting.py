"""`lq report`, `lq list` and `lq version`."""

from pathlib import Path
from typing import Annotated

import typer

from lq.cli.options import Kind
from lq.cli.printing import print_table


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory for report.html, report.png and results.csv.")] = Path("report"),
) -> None:
    """One self-contained page with tables and plots, comparing several runs."""
    from lq.runs.report import write_report
    from lq.runs.results import Results

    page = write_report([(str(run), Results.read(run / "results.json")) for run in runs], out)
    print(f"wrote {page}")


def list_(kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)]) -> None:
    """What there is: methods by their literature names, number formats, model families."""
    from lq.catalogue import catalogue

    print_table(["name", "what it is", "options"], catalogue(kind.value))


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
