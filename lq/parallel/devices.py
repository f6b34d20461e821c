"""Accelerators that a model may be planned for: how much memory one has, and how many there are in a topology."""

import math
import re
from typing import NamedTuple

from lq.errors import UserError

# Bytes of high-bandwidth memory of one device, as JAX counts devices (a v4 or v5p chip is one).
MEMORY = {
    "v4": 32 << 30,
    "v5e": 16 << 30,
    "v5p": 95 << 30,
    "v6e": 32 << 30,
    "a100": 80 * 10**9,
    "h100": 80 * 10**9,
    "h200": 141 * 10**9,
    "b200": 180 * 10**9,
}
TPU = re.compile(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+)+)")
GPU = re.compile(r"(a100|h100|h200|b200)(?:x(\d+))?")


class Topology(NamedTuple):
    """Devices of one kind; `tpu` is the name that the TPU compiler knows them by, None for others."""

    kind: str
    count: int
    memory: int  # bytes of each
    tpu: str | None = None


def topology(text: str) -> Topology:
    """`v5e:2x4`, `h200x8`, `h200`. Raises UserError for what is none."""
    if found := TPU.fullmatch(text):
        return Topology(found[1], math.prod(map(int, found[2].split("x"))), MEMORY[found[1]], text)
    if found := GPU.fullmatch(text):
        return Topology(found[1], int(found[2] or 1), MEMORY[found[1]])
    raise UserError(f"topology: {text!r}; write a slice of v4, v5e, v5p or v6e such as v5e:2x4, or GPUs such as h200x8")
