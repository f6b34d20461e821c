"""Writing a quantized checkpoint part by part, resumable after every shard."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.numpy

from lq.allocation.plan import Plan
from lq.atomic import write_file, write_text
from lq.checkpoint.layout import FORMAT, shard_name, to_tensors
from lq.errors import UserError
from lq.models.loading import MANIFEST, PROGRESS
from lq.models.source import ParameterSource

# What is copied from the original's directory: everything that describes it, no weights.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
NOT_COPIED = ("*.index.json", MANIFEST, PROGRESS)


def write_quantized(
    source: ParameterSource,
    plan: Plan,
    out: Path,
    *,
    quantizer: dict,
    description: Path,
    resume: bool = False,
    on_part: Callable[[str], None] | None = None,
) -> None:
    """Writes a quantized model into the directory `out`, holding one part at a time.

    Every shard is written atomically and recorded with its checksum; the manifest comes last. With `resume`, shards
    that are recorded and whole are kept, and the result is the same to the bit.

    Args:
      source: the packed parts, usually a `PlannedSource`, which quantizes as it is read.
      plan: the plan they were packed by.
      out: a new or empty directory, or an interrupted write of the same plan.
      quantizer: method and options, as JSON; recorded, and part of what makes a write the same one.
      description: the original's directory, whose config and tokenizer are copied.
      resume: go on with an interrupted write.
      on_part: called with a part's name once it is on disk.

    Raises:
      UserError: `out` holds something else, or an interrupted write of another plan, or `resume` is needed to go on.
    """
    out = Path(out)
    identity = _identity(plan, quantizer)
    done = _recorded(out, identity, resume)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / PROGRESS, json.dumps({"identity": identity, "shards": done}))
    for part in part_names(source):
        if part not in done or not _whole(out / shard_name(part), done[part]):
            params = source.part(part)
            file = out / shard_name(part)
            write_file(file, lambda path, p=params: safetensors.numpy.save_file(to_tensors(p), path))
            done[part] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
            write_text(out / PROGRESS, json.dumps({"identity": identity, "shards": done}))
        if on_part:
            on_part(part)
    _copy_description(Path(description), out)
    manifest = {"format": FORMAT, "quantizer": quantizer, "plan": plan.to_dict(), "shards": done}
    write_text(out / MANIFEST, json.dumps(manifest, separators=(",", ":")))
    (out / PROGRESS).unlink()


def part_names(source: ParameterSource) -> list[str]:
    """The parts a model is written in, in order."""
    return ["embed", *(f"block_{i}" for i in range(source.config.num_blocks)), "head"]


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _identity(plan: Plan, quantizer: dict) -> str:
    text = json.dumps([plan.to_dict(), quantizer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recorded(out: Path, identity: str, resume: bool) -> dict:
    """Shards already there that belong to this very write."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out}: already holds a finished checkpoint; give another --out or remove it")
    if not (out / PROGRESS).exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: not empty, and no checkpoint of lq; give a new directory")
        return {}
    try:
        record = json.loads((out / PROGRESS).read_text())
        same, shards = record["identity"] == identity, record["shards"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{out / PROGRESS}: damaged; remove {out} and start again") from None
    for stale in out.glob(".*.safetensors.*"):  # a shard that was being written when the process was killed
        stale.unlink()
    if not same:
        raise UserError(f"{out}: an interrupted write of another plan or model; give another --out or remove it")
    if not resume:
        raise UserError(f"{out}: an interrupted write of this plan; add --resume to go on with it")
    return shards


def _whole(file: Path, record: dict) -> bool:
    return file.is_file() and file.stat().st_size == record["bytes"] and sha256(file) == record["sha256"]


def _copy_description(source: Path, out: Path) -> None:
    skipped = {f for pattern in NOT_COPIED for f in source.glob(pattern)}
    for pattern in COPIED:
        for file in sorted(set(source.glob(pattern)) - skipped):
            write_file(out / file.name, lambda path, f=file: shutil.copyfile(f, path))
