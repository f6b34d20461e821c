"""The application: registers verbs, and turns what they raise into one line and an exit status.

A mistake of the user's is one line on standard error and exit status 2. Anything else is a defect and keeps its
traceback (status 1). Ctrl-C exits with 130; of several processes those that another has left exit with 75.
"""

import errno
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from lq.errors import UserError
from lq.processes import another_is_gone, leave, several

# The hub library is used for configs and tokenizers alone; its advice to install torch is of no use here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, or the size a file may have

app = typer.Typer(
    help="Layer-wise low-bit quantization of language models in JAX.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def register(function: Callable[..., None]) -> None:
    """Makes `function` a verb of its name, and what it may raise exit statuses."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            status = _told(error, function)
            if several():
                if status is None:
                    traceback.print_exc()
                leave(1 if status is None else status)
            if status is None:
                raise
            raise typer.Exit(status) from None

    app.command(name=function.__name__.rstrip("_").replace("_", "-"))(run)


def _told(error: BaseException, function: Callable[..., None]) -> int | None:
    """Says in one line what went wrong; the exit status. None, and nothing said, for a defect."""
    if isinstance(error, UserError):
        print(f"lq: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):  # whoever read our output has stopped reading, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):  # a path of the user's that cannot be read or written
        hint = f"; make room{_go_on(function, ', then')}" if error.errno in FULL else ""
        print(f"lq: {error.filename or error}: {error.strerror or 'cannot be used'}{hint}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(f"\nlq: interrupted{_go_on(function, ';')}", file=sys.stderr)
        return 130
    if another_is_gone(error):
        print(f"lq: another process of this run has ended, see what it said{_go_on(function, ';')}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return None


def _go_on(function: Callable[..., None], after: str) -> str:
    """How to go on with a verb that was cut short, where it keeps what it did."""
    if function.__name__ not in ("run", "quantize"):
        return ""
    again = shlex.join(["lq", *sys.argv[1:], *(["--resume"] if "--resume" not in sys.argv else [])])
    return f"{after} go on with: {again}"


def main() -> None:
    """Entry point. A command line that does not parse is one line too."""
    usage_error: Any = typer.BadParameter.__base__  # typer exports no name for it, and brings its own click or not
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="lq", standalone_mode=False))
    except usage_error as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "lq"
        problem = " ".join(error.format_message().split()).rstrip(".")
        print(f"lq: {problem[:1].lower()}{problem[1:]}; see {verb} --help", file=sys.stderr)
        sys.exit(2)
