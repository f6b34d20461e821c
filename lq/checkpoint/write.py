"""Writing a quantized checkpoint part by part, resumable after every shard."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from lq.allocation.plan import DENSE_BITS, Plan
from lq.atomic import leftovers, write_file, write_text
from lq.checkpoint.layout import FORMAT, leaf_path, shard_name, shard_records, to_tensors
from lq.checkpoint.states import PATTERN, restore_states, save_states
from lq.checkpoint.transformed import CHANGEABLE, differing_fields, to_json
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.decoder import abstract_params
from lq.models.loading import MANIFEST, PROGRESS, read_config
from lq.models.matrices import model_shapes, other_weights
from lq.models.source import ParameterSource, Params
from lq.quantizers.stream import QuantizedStream

# What is copied from the original's directory: everything that describes it, no weights.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
SAFETENSORS_OWN = ".tmp??????"  # the temporary files that safetensors itself writes beside what it is told to write
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
    that are recorded and whole are kept, and the result is the same to the bit. A write that is refused takes back
    what it began; one that is interrupted leaves what it wrote.

    Args:
      source: the packed parts, usually a `PlannedSource` or a `QuantizedStream`, which quantize as they are read. The
        calibration states of the latter are kept beside the shards until the last is written. Of a transformed model,
        what its config changed is recorded too.
      plan: the plan they were packed by; of a transformed model, see `lq.allocation.adapted`.
      out: a new or empty directory, or an interrupted write of the same plan.
      quantizer: method and options, as JSON; recorded, and part of what makes a write the same one. A transform that
        went before, with its options, belongs in here.
      description: the original's directory, whose config and tokenizer are copied.
      resume: go on with an interrupted write.
      on_part: called with a part's name once it is on disk.

    Raises:
      UserError: `out` holds something else, or an interrupted write of another plan, or `resume` is needed to go on; a
        plan or a description of another model; weights that cannot be packed; parameters that are not those of the
        plan, or dense ones of more than 16 bits. `out` is then as it was.
    """
    out, description = Path(out), Path(description)
    transformed = _check_model(source.config, plan, description)
    identity = _identity(plan, quantizer, transformed)
    recorded, states = _claim(out, identity, resume)
    shapes = abstract_params(source.config)
    done = {part: recorded[part] for part in part_names(source) if part in recorded}
    with _taken_back_if_refused(out, part_names(source), identity, done):
        out.mkdir(parents=True, exist_ok=True)
        killed = [file for pattern in (*COPIED, shard_name("*"), PATTERN) for file in leftovers(out, pattern)]
        for file in [*killed, *out.glob(SAFETENSORS_OWN)]:
            file.unlink()
        if isinstance(source, QuantizedStream) and states and _whole(out / states["file"], states):
            restore_states(out, states["file"], source)
        _record(out, identity, done, states)
        for part in part_names(source):
            file = out / shard_name(part)
            if part not in done or not _whole(file, done[part]):
                _write_part(source, part, file, _planned_bytes(part, shapes[part], plan))
                done[part] = _recorded(file)
                if isinstance(source, QuantizedStream) and part.startswith("block_"):
                    states = {"file": save_states(out, source)}
                    states |= _recorded(out / states["file"])
                _record(out, identity, done, states)
                _remove_states(out, but=states)
            if on_part:
                on_part(part)
        _remove_states(out)
        _copy_description(description, out)
        manifest = {"format": FORMAT, "quantizer": quantizer, "plan": plan.to_dict(), "shards": done}
        manifest |= {"transformed": transformed} if transformed else {}
        write_text(out / MANIFEST, json.dumps(manifest, separators=(",", ":")))
        (out / PROGRESS).unlink()


def check_output(out: str | Path, resume: bool = False) -> None:
    """Whether a quantized checkpoint can be written into `out`, asked before anything expensive. Changes nothing.

    An interrupted write passes with `resume`; that it is one of the same plan, `write_quantized` tests.

    Raises:
      UserError: `out` or a directory above it is a file or not writable, `out` holds something else, or `resume` is
        needed to go on.
    """
    _claim(Path(out), None, resume)


def part_names(source: ParameterSource) -> list[str]:
    """The parts a model is written in, in order."""
    return ["embed", *(f"block_{i}" for i in range(source.config.num_blocks)), "head"]


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _identity(plan: Plan, quantizer: dict, transformed: dict) -> str:
    text = json.dumps([plan.to_dict(), quantizer, *([transformed] if transformed else [])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _claim(out: Path, identity: str | None, resume: bool) -> tuple[dict[str, dict], dict[str, Any] | None]:
    """What `out` records of shards and states of this very write, or of whichever write where `identity` is None.

    Changes nothing; raises UserError when it is not ours to write.
    """
    _check_place(out)
    if not (out / PROGRESS).exists():
        if (out / MANIFEST).exists():
            raise UserError(f"{out}: already holds a finished checkpoint; give another --out or remove it")
        files = set(out.iterdir()) if out.is_dir() else set()
        if files - set(leftovers(out, PROGRESS)):
            raise UserError(f"{out}: not empty, and no checkpoint of lq; give a new directory")
        if files and not resume:
            raise UserError(f"{out}: a write that was interrupted as it began; add --resume to go on, or remove it")
        return {}, None
    try:
        record = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        same, shards = record["identity"] == (identity or record["identity"]), shard_records(record["shards"])
        states = record.get("states")
        if states is not None:
            shard_records({"states": states})
            states = {**states, "file": Path(states["file"]).name}
    except (KeyError, TypeError, IndexError, ValueError):  # ValueError: what json and decoding raise too
        raise UserError(f"{out / PROGRESS}: damaged; remove {out} and start again") from None
    if not same:
        raise UserError(f"{out}: an interrupted write of another plan or model; give another --out or remove it")
    if not resume:
        which = "" if identity is None else " of this plan"
        raise UserError(f"{out}: an interrupted write{which}; add --resume to go on with it, or give another --out")
    return shards, states


def _check_place(out: Path) -> None:
    """Raises UserError unless `out` is a directory that can be written to, or can be made one."""
    there = next(place for place in (out, *out.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{out}: {there} is no directory; give a new directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {there} cannot be written to; give another --out")


def _check_model(config: ModelConfig, plan: Plan, description: Path) -> dict[str, Any]:
    """What transforms changed in the config since the directory `description`, as JSON.

    Raises UserError unless the plan is for a model of this config, and the directory describes it or its original.
    """
    if plan.shapes != model_shapes(config) or plan.other_weights != other_weights(config):
        raise UserError("plan: made for another model; make it from this model's scores")
    described = read_config(description)
    for name in differing_fields(described, config):
        if name not in CHANGEABLE:
            raise UserError(
                f"{description / 'config.json'}: of another model than the weights (they differ in {name}); give the "
                "directory of the original"
            )
    return to_json(described, config)


@contextlib.contextmanager
def _taken_back_if_refused(out: Path, parts: list[str], identity: str, done: Mapping[str, dict]):
    """On UserError removes the files and directories made inside it, and goes back to the record of an earlier write.

    `done` is what that one recorded, and grows inside; a damaged shard of it that was replaced stays replaced.
    """
    resumed, earlier = (out / PROGRESS).exists(), list(done)
    files = [file for file in (out / PROGRESS, *(out / shard_name(part) for part in parts)) if not file.exists()]
    directories = [place for place in (out, *out.parents) if not place.exists()]
    try:
        yield
    except UserError:
        for file in files:
            file.unlink(missing_ok=True)
        if resumed:
            _record(out, identity, {part: done[part] for part in earlier})
        with contextlib.suppress(OSError):  # someone else has put something there
            for place in directories:
                place.rmdir()
        raise


def _record(out: Path, identity: str, done: Mapping[str, dict], states: Mapping[str, Any] | None = None) -> None:
    write_text(out / PROGRESS, json.dumps({"identity": identity, "shards": done, "states": states}))


def _recorded(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _remove_states(out: Path, but: Mapping[str, Any] | None = None) -> None:
    for file in out.glob(PATTERN):
        if but is None or file.name != but["file"]:
            file.unlink()


def _write_part(source: ParameterSource, part: str, file: Path, planned: Mapping[str, int]) -> None:
    """Nothing of the part outlives this function: the next is read when it is gone."""
    tensors = to_tensors(source.part(part))
    _check_sizes(tensors, part, planned)
    write_file(file, lambda path: safetensors.numpy.save_file(tensors, path))


def _planned_bytes(part: str, shapes: Params, plan: Plan) -> dict[str, int]:
    """Bytes of every leaf of a part: packed as the plan says, or in 16 bits. Over all parts they are `plan.nbytes`."""
    leaves: dict[str, Any] = flatten_dict(shapes, sep="/")
    dense = {path: DENSE_BITS * math.prod(leaf.shape) // 8 for path, leaf in leaves.items()}
    packed = {leaf_path(path): plan.size_bits(path) // 8 for path in plan.specs if path.split("/")[0] == part}
    return dense | packed


def _check_sizes(tensors: Mapping[str, np.ndarray], part: str, planned: Mapping[str, int]) -> None:
    """Raises UserError unless every leaf, the arrays of a packed one together, has the bytes that the plan counts."""
    written = Counter()
    for name, tensor in tensors.items():
        written[name.partition(":")[0]] += tensor.nbytes
    for leaf in {**planned, **written}:
        if written[leaf] != planned.get(leaf, 0):
            raise UserError(
                f"{part}/{leaf}: {written[leaf]} bytes, {planned.get(leaf, 0)} in the plan, where what stays dense has "
                f"{DENSE_BITS} bits; give the parameters that lq.quantize made by this plan"
            )


def _whole(file: Path, record: dict) -> bool:
    return file.is_file() and file.stat().st_size == record["bytes"] and sha256(file) == record["sha256"]


def _copy_description(source: Path, out: Path) -> None:
    skipped = {f for pattern in NOT_COPIED for f in source.glob(pattern)}
    for pattern in COPIED:
        for file in sorted(set(source.glob(pattern)) - skipped):
            write_file(out / file.name, lambda path, f=file: shutil.copyfile(f, path))
