"""Rows of a comparison: a line of JSON each, appended as soon as it is measured, beside what says what they are of.

rows.jsonl           the rows
identity.json        what they depend on but for what their names say
environments.json    versions and devices they were measured with
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lq.atomic import write_text
from lq.errors import UserError
from lq.runs.environment import device_name, versions

Row = TypeVar("Row")
Value = TypeVar("Value", list, dict)


def rows_of(file: Path, kind: type[Row]) -> list[Row]:
    """The rows measured so far; a line that a crash cut short is left out."""
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            found.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def append(file: Path, row: Any) -> None:
    """One write, so that lines of several processes do not mix; behind a line that a crash cut short, a new one."""
    line = (json.dumps(dataclasses.asdict(row)) + "\n").encode()
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        whole = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
        os.write(descriptor, line if whole else b"\n" + line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim(out: Path, fixed: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> None:
    """Says in `out` what its rows are of, and on what they were measured.

    Args:
      out: the directory.
      fixed: what all rows share.
      named: kind ("methods") -> name -> options. Names may be added.

    Raises:
      UserError: where rows are there of another `fixed`, of a name with other options, or of nobody knows what.
    """
    file = out / "identity.json"
    identity = json.loads(json.dumps({**fixed, **named}))
    environments = out / "environments.json"
    found = _read(environments, list) if environments.exists() else []
    if file.exists():
        there = _read(file, dict)
        for key in fixed:
            if there.get(key) != identity[key]:
                raise UserError(f"{out}: rows of another {key} ({there.get(key)}, here {identity[key]}); write --out")
        for kind in named:
            if not isinstance(there.get(kind, {}), dict):
                raise _damaged(file, f"{kind} are no mapping")
            for name, options in there.get(kind, {}).items():
                if identity[kind].get(name, options) != options:
                    raise UserError(
                        f"{out}: rows of {name} with other options ({options}); write --out, or another name"
                    )
            identity[kind] = there.get(kind, {}) | identity[kind]
    elif (out / "rows.jsonl").exists():
        raise UserError(f"{out}: rows without identity.json, which says what they are of; copy it as well")
    write_text(file, json.dumps(identity, indent=1))
    if (here := {"versions": versions(), "device": device_name()}) not in found:
        write_text(environments, json.dumps([*found, here], indent=1))


def _read(file: Path, kind: type[Value]) -> Value:
    """The JSON of a file, which is of one kind."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, error) from None
    if not isinstance(found, kind):
        raise _damaged(file, f"{type(found).__name__} in place of {kind.__name__}")
    return found


def _damaged(file: Path, what: object) -> UserError:
    return UserError(f"{file}: damaged ({what}); copy it again from where the rows are from")


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    bar = "|" + " --- |" * len(names)
    return "\n".join([f"| {' | '.join(names)} |", bar, *(f"| {' | '.join(cells)} |" for cells in rows)])
