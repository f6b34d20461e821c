"""`shards.json`: what an unfinished write has on disk, and which write it is, so that it can be gone on with.

identity   what makes two writes the same: the model, the plan's checksum, the quantizer, what transforms changed, the
           code
shards     part -> bytes and sha256
states     the calibration states at which the quantizer stands: file, bytes, sha256; null where there are none
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from lq.allocation.plan import Plan
from lq.atomic import write_text
from lq.checkpoint.layout import shard_records
from lq.errors import UserError
from lq.models.loading import PROGRESS
from lq.sealed import sealed, unsealed
from lq.version import code_version

SHOWN = 3  # differences that fit into one line


@dataclasses.dataclass
class WriteRecord:
    """What is recorded of an unfinished write; grows with it."""

    identity: dict[str, Any]
    shards: dict[str, dict] = dataclasses.field(default_factory=dict)
    states: dict[str, Any] | None = None

    @classmethod
    def read(cls, out: Path) -> "WriteRecord":
        """That of the unfinished write in `out`. Raises UserError for a damaged one."""
        try:
            fields = unsealed(json.loads((out / PROGRESS).read_text(encoding="utf-8")))
            states = fields["states"]
            if states is not None:
                shard_records({"states": states})
                states = {**states, "file": Path(states["file"]).name}
            return cls(dict(fields["identity"]), shard_records(fields["shards"]), states)
        except (KeyError, TypeError, IndexError, ValueError):  # ValueError: what json and decoding raise too
            raise UserError(f"{out / PROGRESS}: damaged; remove {out} and start again") from None

    def write(self, out: Path) -> None:
        """Replaces the record in `out`, atomically."""
        write_text(out / PROGRESS, json.dumps(sealed(dataclasses.asdict(self))))

    def copy(self) -> "WriteRecord":
        """One that does not grow with this."""
        return dataclasses.replace(self, shards=dict(self.shards))


def identity_of(plan: Plan, quantizer: dict, transformed: dict) -> dict[str, Any]:
    """What makes two writes the same one, as JSON gives it back."""
    checksum = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
    found = {"model": plan.model, "plan": checksum, "quantizer": quantizer, "transformed": transformed}
    found |= {"code": code_version()}
    return json.loads(json.dumps(found))


def differences(there: Any, here: Any) -> str:
    """In one line where two identities differ: `quantizer.options.damping (0.1 there, 0.01 here)`."""
    found = _differing(there, here, "")
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _differing(there: Any, here: Any, path: str) -> list[str]:
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list({**there, **here})
        return [line for key in keys for line in _differing(there.get(key), here.get(key), f"{path}.{key}".strip("."))]
    if there == here:
        return []
    if path in ("model", "plan"):  # checksums, which say nothing to a reader
        return [path]
    return [f"{path} ({_brief(there)} there, {_brief(here)} here)"]


def _brief(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
