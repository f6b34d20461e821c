"""What a run measured: one `Row` per evaluated model, written as `results.json` and read back by the report.

Perplexity at equal bits per weight is the only comparison between methods, so every row carries both numbers of its
size, and every file carries the protocol the perplexity was measured by.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from lq.errors import UserError

FORMAT = 1  # of results.json; raised when a field changes its meaning

Group = Literal["original", "uniform", "finer_groups", "plan", "move"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model, measured."""

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
    seconds: float  # wall time of quantizing and evaluating

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Row":
        """From JSON, where tuples are lists."""
        bits = tuple(fields["bits_per_block"])
        return cls(bits_per_block=bits, **{name: fields[name] for name in fields if name != "bits_per_block"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A whole run."""

    title: str
    model: dict  # name, family, blocks, parameters, dtype
    protocol: dict  # corpus, window, stride, scored tokens: how perplexity was measured
    quantizer: dict  # method, options, group size, symmetric, scale dtype; what is counted
    environment: dict  # versions, device, seeds; wall seconds and peak memory over all sessions of the run
    scores: dict[str, tuple[float, ...]]  # metric -> value per block, canonical direction: larger deserves more bits
    rows: tuple[Row, ...]
    conclusion: str  # one sentence, computed from the rows
    format: int = FORMAT

    def write(self, path: Path) -> None:
        from lq.atomic import write_text

        write_text(path, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises UserError when `path` is no results file of this format."""
        try:
            data = json.loads(Path(path).read_text())
            rows = tuple(Row.from_dict(fields) for fields in data.pop("rows"))
            scores = {metric: tuple(values) for metric, values in data.pop("scores").items()}
            results = cls(rows=rows, scores=scores, **data)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run `lq run` first, then `lq report` on its directory") from None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not a results file of this version of lq ({error}); run the experiment again"
            ) from None
        if results.format != FORMAT:
            raise UserError(
                f"{path}: results format {results.format}, this lq reads {FORMAT}; run the experiment again"
            )
        return results
