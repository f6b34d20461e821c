"""Calibration states on disk: what an interrupted quantization needs besides its shards to go on to the bit.

Computing them again from the shards would take a pass over every block that is done, and on another device would not
give the same. So they are kept as they are after a block, one file at a time:

    states-4.safetensors     `states.0` ... one array per batch, `original.0` ... where that chain is another

Of long texts through wide models they are gigabytes, and writing them takes longer than a fast device takes for a
block. `Pace` says after which blocks they are written; what was quantized since is quantized again after an
interruption.
"""

import contextlib
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

from lq.checkpoint.files import write_tensors
from lq.quantizers.stream import Chains, QuantizedStream

PATTERN = "states-*.safetensors"
SHARE = 0.05  # of the time, which writing states may take ...
QUICK = 1.0  # ... unless it takes less than so many seconds: then they are written after every block


class Pace:
    """When states are due: after every block, or as often as writing them takes a small share of the time."""

    def __init__(self):
        self._took, self._ended = 0.0, time.monotonic()

    @property
    def due(self) -> bool:
        return self._took < QUICK or time.monotonic() - self._ended >= self._took / SHARE

    @contextlib.contextmanager
    def writing(self):
        """Around one writing."""
        started = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took = self._ended - started


def save_states(out: Path, source: QuantizedStream) -> str:
    """Writes the states at which `source` stands; returns the name of the file."""
    chains = source.chains()
    arrays = {f"states.{i}": np.ascontiguousarray(h) for i, h in enumerate(chains.states)}
    arrays |= {f"original.{i}": np.ascontiguousarray(h) for i, h in enumerate(chains.original or [])}
    name = PATTERN.replace("*", str(chains.position))
    write_tensors(out / name, arrays)
    return name


def restore_states(out: Path, name: str, source: QuantizedStream) -> None:
    """Lets `source` go on from the states in `out / name`, whose checksum the caller has compared."""
    arrays = safetensors.numpy.load_file(out / name)

    def chain(prefix: str) -> list[np.ndarray]:
        return [arrays[f"{prefix}.{i}"] for i in range(sum(key.startswith(f"{prefix}.") for key in arrays))]

    source.restore(Chains(int(name.split("-")[1].split(".")[0]), chain("states"), chain("original") or None))
