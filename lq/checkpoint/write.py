"""Writing a quantized checkpoint part by part, resumable after every shard."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.numpy

from lq.allocation.plan import Plan
from lq.atomic import leftovers, write_file, write_text
from lq.checkpoint.layout import FORMAT, leaf_bytes, leaf_path, shard_name, shard_records, to_tensors
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
      UserError: `out` holds something else, or an interrupted write of another plan, or `resume` is needed to go on;
        `out` is then as it was.
      RuntimeError: a packed matrix has not the size that the plan says.
    """
    out = Path(out)
    identity = _identity(plan, quantizer)
    recorded = _claim(out, identity, resume)
    done = {part: recorded[part] for part in part_names(source) if part in recorded}
    out.mkdir(parents=True, exist_ok=True)
    for pattern in (*COPIED, shard_name("*")):
        for file in leftovers(out, pattern):
            file.unlink()
    write_text(out / PROGRESS, json.dumps({"identity": identity, "shards": done}))
    for part in part_names(source):
        file = out / shard_name(part)
        if part not in done or not _whole(file, done[part]):
            params = source.part(part)
            write_file(file, lambda path, p=params: safetensors.numpy.save_file(to_tensors(p), path))
            _check_sizes(file, part, plan)
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


def _claim(out: Path, identity: str, resume: bool) -> dict[str, dict]:
    """What `out` records of shards that belong to this very write. Changes nothing; raises UserError when it is not
    ours to write."""
    if not (out / PROGRESS).exists():
        if (out / MANIFEST).exists():
            raise UserError(f"{out}: already holds a finished checkpoint; give another --out or remove it")
        files = set(out.iterdir()) if out.is_dir() else set()
        if (out.exists() and not out.is_dir()) or files - set(leftovers(out, PROGRESS)):
            raise UserError(f"{out}: not empty, and no checkpoint of lq; give a new directory")
        if files and not resume:
            raise UserError(f"{out}: a write that was interrupted as it began; add --resume to go on, or remove it")
        return {}
    try:
        record = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        same, shards = record["identity"] == identity, shard_records(record["shards"])
    except (KeyError, TypeError, IndexError, ValueError):  # ValueError: what json and decoding raise too
        raise UserError(f"{out / PROGRESS}: damaged; remove {out} and start again") from None
    if not same:
        raise UserError(f"{out}: an interrupted write of another plan or model; give another --out or remove it")
    if not resume:
        raise UserError(f"{out}: an interrupted write of this plan; add --resume to go on with it")
    return shards


def _check_sizes(shard: Path, part: str, plan: Plan) -> None:
    """Raises RuntimeError unless every matrix that the plan packs lies in the shard with the bytes the plan counts."""
    stored = leaf_bytes(shard)
    for path in plan.specs:
        if path.split("/")[0] == part:
            written, planned = stored.get(leaf_path(path), 0), plan.size_bits(path) // 8
            if written != planned:
                raise RuntimeError(f"{path}: {written} bytes in {shard}, {planned} in the plan it was to be packed by")


def _whole(file: Path, record: dict) -> bool:
    return file.is_file() and file.stat().st_size == record["bytes"] and sha256(file) == record["sha256"]


def _copy_description(source: Path, out: Path) -> None:
    skipped = {f for pattern in NOT_COPIED for f in source.glob(pattern)}
    for pattern in COPIED:
        for file in sorted(set(source.glob(pattern)) - skipped):
            write_file(out / file.name, lambda path, f=file: shutil.copyfile(f, path))
