"""What a run measured: one `Row` per evaluated model, written as `results.json` and read back by the report.

Perplexity at equal bits per weight is the only comparison between methods, so every row carries both numbers of its
size, and every file carries the protocol the perplexity was measured by.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lq.atomic import write_text
from lq.errors import UserError
from lq.sealed import sealed, unsealed

FORMAT = 2  # of results.json; raised when a field changes its meaning

STRICT = ConfigDict(strict=True, extra="forbid")  # what is read must have these fields, of these types

Group = Literal["original", "uniform", "finer_groups", "plan", "move"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model, measured."""

    __pydantic_config__ = STRICT

    name: str  # unique in the file: "lim @ 3.0", "uniform 4", "original"
    group: Group  # what it is there for; "move" rows are the sweep that lowers blocks one by one
    order: str | None = None  # "lim", "zd", "first_last", "random", "reverse lim" ...; None for uniform models
    seed: int | None = None  # of a random order
    target_bpw: float | None = None
    code_bits: float  # mean code width over the counted weights
    bpw: float  # with scales and zero points
    bytes_on_disk: int | None  # of the packed weights; None when this model was not written
    bytes_on_device: int
    perplexity: float
    kl: float | None = None  # mean KL(original || this) per token, nats
    top1: float | None = None  # fraction of tokens whose most likely next token is the original's
    bits_per_block: tuple[float, ...] = ()  # mean code width of each block, first to last; empty for the original

    @classmethod
    def from_json(cls, text: str | bytes) -> "Row":
        """Raises ValueError, one line, unless `text` is a row with every field of its type."""
        return _from_json(cls, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A whole run."""

    __pydantic_config__ = STRICT

    title: str
    model: dict  # name, family, blocks, parameters, dtype
    protocol: dict  # corpus, window, stride, scored tokens: how perplexity was measured
    quantizer: dict  # method, options, group size, symmetric, scale dtype; what is counted
    environment: dict  # versions, device, seeds; what it took is in run.json, since it differs from run to run
    scores: dict[str, tuple[float, ...]]  # metric -> value per block, canonical direction: larger deserves more bits
    rows: tuple[Row, ...]
    conclusion: str  # one sentence, computed from the rows
    format: int = FORMAT

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(sealed(dataclasses.asdict(self)), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises UserError when `path` is no results file of this format, or a damaged one."""
        try:
            data = unsealed(json.loads(Path(path).read_bytes()))
            found = data.get("format") if isinstance(data, dict) else None
            if type(found) is int and found != FORMAT:
                raise UserError(f"{path}: results format {found}, this lq reads {FORMAT}; run the experiment again")
            return _from_json(cls, json.dumps(data))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run `lq run` first, then `lq report` on its directory") from None
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"{path}: not a results file of this version of lq ({error}); run the experiment again"
            ) from None


@functools.cache
def _reader(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _from_json(cls: type, text: str | bytes):
    """Lists become tuples; NaN and the infinities are numbers. Raises ValueError, one line that names the field."""
    try:
        return _reader(cls).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
