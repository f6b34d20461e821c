"""Rules that decide the width of matrices, whatever their score."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from lq.errors import UserError
from lq.importance.scores import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pin:
    """Matrices whose path matches `pattern` (anywhere in it) get `bits`, whatever their score; 16 leaves them dense."""

    pattern: str
    bits: int

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise UserError(f"pin {self.pattern!r}: no pattern; write a text such as 'v_proj$'")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pin {self.pattern!r}: not a regular expression ({error})") from None
        if self.bits != 16 and self.bits not in range(1, 9):
            raise UserError(f"pin {self.pattern!r}: {self.bits} bits; write 1 to 8, or 16 to leave the matrix dense")


def table_pins(scores: Scores, embedding_bits: int, head_bits: int) -> list[Pin]:
    """The two options for the tables, as the rules they are; none for a table that is a unit, unless it is given."""
    for name, bits in (("embedding_bits", embedding_bits), ("head_bits", head_bits)):
        if bits != 16 and bits not in range(1, 9):
            raise UserError(f"{name}: {bits}; write 1 to 8, or 16 to leave it dense")
    if head_bits != 16 and "head" not in scores.shapes:
        raise UserError("head_bits: this model's head is its embedding; write embedding_bits")
    widths = {"embed/tokens": embedding_bits, "head": head_bits}
    return [
        Pin(pattern=f"^{path}$", bits=bits) for path, bits in widths.items() if bits != 16 or path not in scores.values
    ]


def deciding_pins(shapes, pins: Sequence[Pin]) -> dict[str, Pin]:
    """Path -> the first pin that matches it, for every matrix the allocator may not touch."""
    matches = {path: [pin for pin in pins if re.search(pin.pattern, path)] for path in shapes}
    return {path: found[0] for path, found in matches.items() if found}


def idle_pins(shapes, pins: Sequence[Pin], deciding: Mapping[str, Pin]) -> dict[str, list[str]]:
    """Patterns that match no matrix, and patterns all of whose matrices an earlier pin decides."""
    at_work = {id(pin) for pin in deciding.values()}
    idle = [pin.pattern for pin in pins if id(pin) not in at_work]
    unused = [pattern for pattern in idle if not any(re.search(pattern, path) for path in shapes)]
    return {"unused_pins": unused, "shadowed_pins": [pattern for pattern in idle if pattern not in unused]}
