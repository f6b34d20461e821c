"""`Journal`: a run directory. What it is of, who may write there, and what of it is done and whole.

    config.yaml      the config, every default filled in
    run.json         which config, model, tokens and code the directory belongs to; anything else is refused. And what
                     it took so far, in all sessions and for every row: an interrupted run has several
    scores/*.json    one per order
    plans/*.json     one per plan, also where two orders give the same
    rows.jsonl       one line per evaluated model, appended as soon as it is measured
    unfinished/      a model that takes long to quantize, block by block, until it is evaluated
    results.json, report.html, report.png, results.csv

All but `run.json` is the same to the bit whether a run was interrupted or not. What is read again, by a resumed run or
a report, carries a checksum; what fails it is made again.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from lq.atomic import leftovers, write_text
from lq.checkpoint.record import differences
from lq.errors import UserError
from lq.lock import LOCK, held
from lq.processes import agreed, is_first
from lq.progress import Progress
from lq.runs.environment import peak_memory_bytes
from lq.runs.results import Row
from lq.sealed import sealed, unsealed

WRITTEN = ("scores/*.json", "plans/*.json", "*.json", "*.yaml", "*.jsonl", "report.*", "results.*")
REFUSED = {  # parts of an identity, in the order in which they are compared, and what is said when one is another
    "model": "a run of another model",
    "experiment": "a run of another config",
    "code": "a run of other code",
}

Readable = TypeVar("Readable")  # a class with `read`


class Journal:
    """An open run directory, held until the end of `opened`. Of several processes the first writes."""

    def __init__(self, directory: Path, identity: dict[str, Any], progress: Progress):
        self.directory, self.identity, self._progress = directory, identity, progress
        self._started = time.perf_counter()
        self._earlier: dict[str, Any] = {}  # what run.json held when this session began
        self._row_seconds: dict[str, float] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, directory: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool, progress: Progress
    ) -> Iterator["Journal"]:
        """Makes `directory` the run's and holds it.

        Args:
          directory: new or empty, or of this very run.
          identity: `title`, `model`, `experiment` and `code`, as JSON.
          resume: go on with what is there.
          overwrite: remove what is there, of whatever experiment of the same title.
          progress: where it is said that something is damaged and made again.

        Raises UserError when it is of another run, when it holds this one and neither `resume` nor `overwrite` is set,
        and while another process has it.
        """
        journal = cls(directory, identity, progress)
        agreed(lambda: journal._check(resume, overwrite))
        with held(directory):
            journal._begin(resume, overwrite)
            yield journal

    def _check(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        """What run.json holds; nothing where the run is new. Changes nothing."""
        record = self.directory / "run.json"
        if not record.exists():
            found = [file for file in self.directory.iterdir() if file.name != LOCK] if self.directory.exists() else []
            if set(found) - set(leftovers(self.directory, "run.json")):
                raise UserError(f"{self.directory}: not empty, and no run of lq; give another output")
            return {}
        found = _read_record(record)
        if overwrite:
            if found.get("title") != self.identity["title"]:
                raise UserError(f"{self.directory}: a run of another experiment; give another output or remove it")
            return {}
        for part, what in REFUSED.items():
            if found.get(part) != self.identity[part]:
                raise UserError(f"{self.directory}: {what}{self._which(part, found)}; give another output or remove it")
        if not resume:
            raise UserError(f"{self.directory}: already holds this run; add --resume to go on, or give another output")
        return found

    def _which(self, part: str, found: dict[str, Any]) -> str:
        if part != "code":
            return ""
        return f" ({differences(found.get(part) or {}, self.identity[part])})"

    def _begin(self, resume: bool, overwrite: bool) -> None:
        self._earlier = agreed(lambda: self._check(resume, overwrite))  # again: now that no other process changes it
        self._row_seconds = dict(self._earlier.get("row_seconds", {}))
        if is_first():
            for pattern in WRITTEN:
                folder, _, name = f"./{pattern}".rpartition("/")
                for file in leftovers(self.directory / folder, name):
                    file.unlink()
            if overwrite:
                self._remove_made()
        self.record()

    def _remove_made(self) -> None:
        (self.directory / "rows.jsonl").unlink(missing_ok=True)
        for folder in ("scores", "plans", "unfinished"):
            shutil.rmtree(self.directory / folder, ignore_errors=True)

    @property
    def seconds(self) -> float:
        """Wall time so far, of the sessions before this one too."""
        return self._earlier.get("seconds", 0.0) + time.perf_counter() - self._started

    @property
    def peak_memory_bytes(self) -> int:
        """The largest of all sessions so far."""
        return max(self._earlier.get("peak_memory_bytes", 0), peak_memory_bytes())

    def record(self) -> None:
        """Writes run.json as of now."""
        taken = {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes, "row_seconds": self._row_seconds}
        if is_first():
            write_text(self.directory / "run.json", json.dumps(sealed({**self.identity, **taken}), indent=1))

    def kept(self, kind: type[Readable], name: str) -> Readable | None:
        """What an earlier session wrote to the file `name`; None where there is none, or a damaged one."""
        return agreed(lambda: self._kept(kind, self.directory / name))

    def _kept(self, kind: Any, file: Path) -> Any:
        if not file.exists():
            return None
        try:
            return kind.read(file)
        except UserError as error:
            self._progress.note(f"{error}; made again")
            return None

    def write(self, name: str, what: Any) -> None:
        """Writes to the file `name`, whole, what has `write`."""
        if is_first():
            what.write(self.directory / name)

    def rows(self) -> list[Row]:
        """Those that are measured. Lines that hold none are dropped, and their models measured again."""
        return agreed(self._rows)

    def _rows(self) -> list[Row]:
        file = self.directory / "rows.jsonl"
        if not file.exists():
            return []
        lines, rows = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(Row.from_json(json.dumps(unsealed(json.loads(line)))))
        damaged = len(lines) - len(rows)
        if damaged and not (damaged == 1 and not lines[-1].endswith("\n")):  # a crash cuts the last line short
            which = f"{damaged} damaged line{'s' if damaged > 1 else ''}"
            self._progress.note(f"{file}: {which} left out and measured again")
        if damaged:
            self._replace(rows)
        return rows

    def add(self, row: Row, seconds: float) -> None:
        """Adds a line, and what it took."""
        self._row_seconds[row.name] = round(seconds, 3)
        if is_first():
            _append(self.directory / "rows.jsonl", _line(row))
        self.record()

    def complete(self, rows: list[Row]) -> None:
        """Puts the lines in order, which those measured again are not in."""
        if is_first() and self._rows() != rows:
            self._replace(rows)

    def _replace(self, rows: list[Row]) -> None:
        write_text(self.directory / "rows.jsonl", "".join(map(_line, rows)))


def _line(row: Row) -> str:
    return json.dumps(sealed(dataclasses.asdict(row))) + "\n"


def _append(file: Path, line: str) -> None:
    try:
        with file.open("a") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None  # errors of writing name no file


def _read_record(file: Path) -> dict[str, Any]:
    """Raises UserError unless `file` holds a JSON object that is whole."""
    try:
        found = unsealed(json.loads(file.read_text(encoding="utf-8")))
    except ValueError:  # what json, decoding and the checksum raise
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged; remove {file.parent} or give another output")
    return found
