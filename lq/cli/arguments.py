"""Text from the command line, read into the library's types. A mistake names the option it was made in."""

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import typer

from lq.allocation import Plan, allocate
from lq.allocation.latency import LatencyLimit
from lq.allocation.pins import Pin
from lq.allocation.plan import Count
from lq.errors import UserError
from lq.importance import Scores
from lq.importance.units import Unit
from lq.numerics.spec import GROUP_SIZES, QuantSpec

PLAN = (  # the options that decide a plan when none is given
    *(
        "bpw",
        "bytes_",
        "bits",
        "allocator",
        "allocator_option",
        "costs",
        "group_size",
        "symmetric",
        "scale_dtype",
        "zero_dtype",
        "rank",
        "mixed",
        "by_energy",
        "pin",
    ),
    *("embedding_bits", "head_bits", "count", "latency", "max_latency", "metric"),
)
TEXT = ("calibration", "samples", "length", "seed")
SAMPLING = ("top_k", "top_p", "seed")


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raises UserError for the first of the options `names` that was given: it would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.rstrip("_").replace("_", "-")
            raise UserError(f"{context.info_name}: {option} is given, but {why}; leave it out")


def check_file(path: Path, option: str) -> None:
    """Raises UserError, before the work is done, where no file can be written at `path`, which `option` was given."""
    if path.is_dir():
        raise UserError(f"{option} {path}: a directory; give a file")
    _check_place(path, option)


def check_directory(path: Path, option: str) -> None:
    """The same of a directory, which may be there."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path}: a file; give a directory")
    _check_place(path / "file", option)


def check_apart(paths: Mapping[str, Path | None]) -> None:
    """Raises UserError where two of the files that a command reads or writes, by their options, are one."""
    given = {option: path.resolve() for option, path in paths.items() if path is not None}
    for (option, path), (other, file) in itertools.combinations(given.items(), 2):
        if path == file:
            raise UserError(f"{other} {paths[other]}: is that of {option} as well; give another")


def _check_place(path: Path, option: str) -> None:
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise UserError(f"{option} {path}: {there} is a file; give a place in a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {there} cannot be written to; give a place that can")


def whole_number(text: str) -> int | None:
    """The number `text` writes in digits 0 to 9; None when it does not."""
    return int(text) if text.isascii() and text.isdigit() else None


def settings(items: Sequence[str] | None, option: str = "--option") -> dict:
    """`KEY=VALUE` items; values are read as YAML, so 3 is a number and true a truth value."""
    import yaml

    read = {}
    for item in items or []:
        key, separator, value = item.partition("=")
        if not separator:
            raise UserError(f"{option} {item}: write KEY=VALUE")
        if key in read:
            raise UserError(f"{option} {item}: {key} is given twice; leave one out")
        try:
            read[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # the second for a date that there is not
            raise UserError(f"{option} {item}: {value} is not YAML; quote it if it is meant as text") from None
    return read


def named(item: str, option: str) -> tuple[str, dict]:
    """The name and the options of `NAME` or `NAME:KEY=VALUE,KEY=VALUE`; commas in brackets belong to a value."""
    name, _, fields = item.partition(":")
    return name, settings([f for f in re.split(r",(?![^\[]*\])", fields) if f], f"{option} {name}:")


def transforms(items: Sequence[str] | None) -> list[dict]:
    """As a config gives them."""
    read = [named(item, "--transform") for item in items or []]
    return [{"name": name, **options} for name, options in read]


def widths(text: str) -> list[int]:
    read = [whole_number(item.strip()) for item in text.split(",")]
    if None in read:
        raise UserError(f"--bits {text}: write widths like 2,3,4")
    return [bits for bits in read if bits is not None]


def pins(items: Sequence[str] | None) -> list[Pin]:
    read = []
    for item in items or []:
        pattern, separator, text = item.rpartition("=")
        bits = whole_number(text)
        if not separator or bits is None:
            raise UserError(f"--pin {item}: write REGEX=BITS, for example 'down_proj=4'")
        read.append(Pin(pattern=pattern, bits=bits))
    return read


def group_sizes(text: str) -> list[int | None]:
    read = [None if item.strip() == "column" else whole_number(item.strip()) for item in text.split(",")]
    for item, size in zip(text.split(","), read, strict=True):
        if item.strip() != "column" and size not in GROUP_SIZES:
            raise UserError(f"--group-size {text}: write {', '.join(map(str, GROUP_SIZES))} or column, or several")
    return read


def spec(given: Mapping[str, Any]) -> QuantSpec:
    """The spec all matrices share but for their width, and for their group size where there are several."""
    same = ("symmetric", "scale_dtype", "zero_dtype", "rank", "mixed", "by_energy")
    return QuantSpec(bits=8, group_size=group_sizes(given["group_size"])[0], **{name: given[name] for name in same})


def counted(text: str) -> Count:
    if text == "blocks" or text == "all":
        return text
    raise UserError(f"--count {text}: write blocks or all")


def unit(text: str) -> Unit:
    units: tuple[Unit, ...] = get_args(Unit)
    for known in units:
        if known == text:
            return known
    raise UserError(f"--unit {text}: write one of {', '.join(units)}")


def latency_limit(table: Path | None, seconds: float | None) -> LatencyLimit | None:
    if table is None and seconds is None:
        return None
    if table is None or seconds is None:
        raise UserError("--latency and --max-latency go together: a table of latencies, and what they may add up to")
    return LatencyLimit(table=table, seconds=seconds)


class Allocation:
    """The options of `lq allocate` and `lq quantize` that decide a plan, read once and applied to any scores.

    `given` has the values of all options by the names of the verb's parameters, as `typer.Context.params` does.
    """

    def __init__(self, given: Mapping[str, Any], method: str, options: Mapping[str, Any]):
        self.spec, sizes = spec(given), group_sizes(given["group_size"])
        self._arguments = {
            "bpw": given["bpw"],
            "nbytes": given["bytes_"],
            "bits": widths(given["bits"]),
            "spec": self.spec,
            "group_sizes": sizes if len(sizes) > 1 else None,
            "method": method,
            "options": options,
            "costs": given["costs"],
            "pins": pins(given["pin"]),
            "embedding_bits": given["embedding_bits"],
            "head_bits": given["head_bits"],
            "count": counted(given["count"]),
            "latency": latency_limit(given["latency"], given["max_latency"]),
        }

    def plan(self, scores: Scores) -> Plan:
        return allocate(scores, **self._arguments)
