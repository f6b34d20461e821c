"""Files that are there whole or not at all: written beside their place, synced, then renamed."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file in the same directory, then moves it to `path`. On error nothing is left.

    Raises OSError that names `path`, not the temporary file, when it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_beside(path, write)
    except OSError as error:
        if error.filename is not None and not _is_temporary(error.filename, path):  # what is written to has no name
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # makes itself the subclass of the number


def leftovers(directory: Path, pattern: str) -> list[Path]:
    """Temporary files that a killed process left of files whose names match the glob `pattern`."""
    return sorted(directory.glob(f".{pattern}.*"))


def write_text(path: Path, text: str) -> None:
    """Replaces the text file at `path`, UTF-8, atomically."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_beside(path: Path, write: Callable[[Path], object]) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _is_temporary(name: object, path: Path) -> bool:
    """Whether `name` is that of a temporary file of `path`."""
    named = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None
    return (
        named is not None
        and named.parent.absolute() == path.parent.absolute()
        and named.name.startswith(f".{path.name}.")
    )
