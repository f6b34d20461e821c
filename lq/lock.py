"""Directories that one process at a time writes to."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lq.errors import UserError
from lq.processes import agreed

LOCK = ".lock"  # there while a directory is held; left by a holder that was killed, whose hold the system forgets


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory where it is missing and holds it until the end; one that was made and is empty then goes.

    Of several processes that are one run the first does so, for all. Raises UserError when another run holds it, and
    OSError when it cannot be made or written to.
    """
    with contextlib.ExitStack() as stack:
        agreed(lambda: stack.enter_context(_held(directory)))
        yield


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _held_file(directory)
        try:
            yield
        finally:
            (directory / LOCK).unlink(missing_ok=True)  # before it is let go: whoever has it open sees that it went
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _held_file(directory: Path) -> int:
    """The open lock file, held. It may have been removed between opening and holding it: then another is made."""
    while True:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(descriptor, directory / LOCK):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{directory}: {holder} writes to it; wait for that to end, or give another directory"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
