"""How far a long job is: a bar with time left on a terminal, plain lines elsewhere, nothing when quiet."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


class Progress:
    """Shows stages of known length on standard error, so that standard output holds results alone."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet

    def note(self, text: str) -> None:
        """A line the user should see whatever stage it is."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields a function to call after each of `total` steps with a word on what was done."""
        if self.quiet:
            yield lambda what: None
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
        yield lambda what: bar.update(task, advance=1, what=what, memory=_memory())


def _lines(name: str, total: int):
    started, done = time.monotonic(), 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        elapsed = time.monotonic() - started
        left = elapsed / done * (total - done)
        print(f"{name} {done}/{total}, {_clock(left)} left, {_memory()}: {what}", file=sys.stderr, flush=True)

    yield step


def _clock(seconds: float) -> str:
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
