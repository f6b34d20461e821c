"""How far a long job is: a bar with time left on a terminal, plain lines elsewhere, nothing when quiet."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol


class Step(Protocol):
    def __call__(self, what: str, light: bool = False) -> None: ...


class Progress:
    """Shows stages of known length on standard error, so that standard output holds results alone."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet

    def note(self, text: str) -> None:
        """A line the user should see whatever stage it is."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Step]:
        """Yields a function to call after each of `total` steps with a word on what was done.

        A step that took no work, because it had been done before, is said to be `light`: the time left is that of the
        others.
        """
        if self.quiet:
            yield lambda what, light=False: None
        elif sys.stderr.isatty():
            yield from _bar(name, total)
        else:
            yield from _lines(name, total)


def _bar(name: str, total: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[what]} [dim]{task.fields[memory]}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, what="", memory="")

        def step(what: str, light: bool = False) -> None:
            bar.update(task, advance=1, what=what, memory=_memory())
            if light:  # the speed is measured anew
                bar.reset(task, completed=int(bar.tasks[0].completed), what=what)

        yield step


def _lines(name: str, total: int):
    started, done, worked = time.monotonic(), 0, 0

    def step(what: str, light: bool = False) -> None:
        nonlocal started, done, worked
        done += 1
        worked += not light
        if not worked:
            started = time.monotonic()
        elapsed = time.monotonic() - started
        left = f"{clock(elapsed / worked * (total - done))} left, " if worked else ""
        print(f"{name} {done}/{total}, {left}{_memory()}: {what}", file=sys.stderr, flush=True)

    yield step


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory() -> str:
    """Resident memory of this process now (its peak where the system does not say)."""
    try:
        with open("/proc/self/statm") as f:
            pages = int(f.read().split()[1])
        import resource

        return f"{pages * resource.getpagesize() / 2**30:.1f} GiB"
    except OSError:
        import resource

        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30:.1f} GiB"
