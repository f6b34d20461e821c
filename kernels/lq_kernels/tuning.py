"""Tuning tables: the configuration that was fastest, by device kind, backend and problem. JSON, a file per device kind.

    {"device_kind": "...", "versions": {"jax": "..."},
     "entries": {"cpu": {"4g128a K4096 N4096 M1 bfloat16": {"threads": 1}}}}

A key holds the segments (width, group, `a` for asymmetric, and the channels when there are several), the shape with the
number of rows rounded up to a bucket, and the dtype of x. Where there is no entry, the backend's heuristics decide.
`python -m lq_kernels.tune` writes these files.
"""

import bisect
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

from lq_kernels.backend import Backend, Config, Problem

SHIPPED = Path(__file__).parent / "tables"
DIRECTORY = "LQ_KERNELS_TABLES"  # the environment variable that names a folder looked into first
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def row_bucket(rows: int) -> int:
    """The bucket of `rows`: the next larger one; the largest for all beyond."""
    return ROW_BUCKETS[min(bisect.bisect_left(ROW_BUCKETS, rows), len(ROW_BUCKETS) - 1)]


def key(problem: Problem) -> str:
    several = len(problem.segments) > 1
    parts = []
    for s in problem.segments:
        group = "column" if s.group_size >= s.in_features else f"g{s.group_size}"
        parts.append(f"{s.bits}{group}{'a' if s.asymmetric else ''}" + (f"x{s.in_features}" if several else ""))
    shape = f"K{problem.in_features} N{problem.out_features} M{row_bucket(problem.rows)}"
    return f"{'+'.join(parts)} {shape} {problem.x_dtype}"


def file_name(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def lookup(backend: Backend, problem: Problem) -> Config | None:
    """The tuned configuration, or None; there is none for a symbolic number of rows.

    Raises ValueError when a table's entry has fields the backend does not know, or values it refuses.
    """
    if problem.device_kind is None or not isinstance(problem.rows, int):
        return None
    fields = _entries(os.environ.get(DIRECTORY), problem.device_kind).get(backend.name, {}).get(key(problem))
    if fields is None:
        return None
    known = {f.name for f in dataclasses.fields(backend.config_type)}
    try:
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown field {unknown[0]!r}; fields are {', '.join(sorted(known))}")
        return backend.config_type(**fields)
    except (TypeError, ValueError) as reason:
        where = f"tuning table of {problem.device_kind}, {backend.name}, {key(problem)!r}"
        raise ValueError(f"{where}: {reason}. Tune again, or remove the entry") from None


@functools.lru_cache(maxsize=64)
def _entries(directory: str | None, device_kind: str) -> dict:
    """Entries by backend; those of the user's folder before the shipped ones."""
    merged: dict[str, dict] = {}
    for folder in (SHIPPED, Path(directory) if directory else None):
        file = folder / file_name(device_kind) if folder else None
        if file is not None and file.is_file():
            for backend, entries in read_entries(file).items():
                merged[backend] = merged.get(backend, {}) | entries
    return merged


def read_entries(file: Path) -> dict[str, dict]:
    """The entries of one table by backend. Raises ValueError, one line, for a file that is none."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return {backend: dict(table) for backend, table in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: not a tuning table; remove it, or write it anew with lq_kernels.tune") from None


def forget() -> None:
    """Tables are read once; after writing one, read anew."""
    _entries.cache_clear()
