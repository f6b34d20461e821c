"""Writing a quantized checkpoint part by part, resumable after every shard."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lq.allocation.plan import DENSE_BITS, Plan
from lq.atomic import leftovers, write_file, write_text
from lq.checkpoint.files import write_tensors
from lq.checkpoint.layout import FORMAT, leaf_path, shard_name, to_tensors
from lq.checkpoint.record import WriteRecord, differences, identity_of
from lq.checkpoint.states import PATTERN, Pace, restore_states, save_states
from lq.checkpoint.transformed import CHANGEABLE, differing_fields, to_json
from lq.errors import UserError
from lq.lock import LOCK, held
from lq.models.config import ModelConfig
from lq.models.decoder import abstract_params
from lq.models.loading import MANIFEST, PROGRESS, read_config
from lq.models.matrices import model_shapes, other_weights
from lq.models.source import ParameterSource, Params, part_names
from lq.processes import agreed, is_first
from lq.quantizers.stream import QuantizedStream
from lq.sealed import sealed

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
    on_part: Callable[[str], None] = lambda part: None,
    on_kept: Callable[[str], None] = lambda part: None,
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
      on_kept: called instead with the name of one that was there already.

    Raises:
      UserError: `out` holds something else, or an interrupted write of another plan, or `resume` is needed to go on; a
        plan or a description of another model; weights that cannot be packed; parameters that are not those of the
        plan, or dense ones of more than 16 bits. `out` is then as it was.
    """
    out, description = Path(out), Path(description)
    transformed = _check_model(source.config, plan, description)
    identity = identity_of(plan, quantizer, transformed)
    agreed(lambda: _claim(out, identity, resume))
    with held(out):
        record = agreed(lambda: _claim(out, identity, resume))  # again, since only now no other process changes it
        _write(source, plan, out, record, description=description, on_part=on_part, on_kept=on_kept)


def _write(
    source: ParameterSource,
    plan: Plan,
    out: Path,
    record: WriteRecord,
    *,
    description: Path,
    on_part: Callable[[str], None],
    on_kept: Callable[[str], None],
) -> None:
    """What `record` lacks, and then the manifest."""
    shapes = abstract_params(source.config)
    with _taken_back_if_refused(out, part_names(source), record) as earlier:
        if agreed(lambda: _begin(out, record)) and isinstance(source, QuantizedStream):
            restore_states(out, (record.states or {})["file"], source)
        pace = Pace()
        for part in part_names(source):
            file = out / shard_name(part)
            if agreed(functools.partial(_is_kept, record, part, file)):
                on_kept(part)
                continue
            found = _write_part(source, part, file, _planned_bytes(part, shapes[part], plan))
            record.shards[part] = found | _measured(source, part)
            if isinstance(source, QuantizedStream) and part.startswith("block_") and agreed(lambda: pace.due):
                with pace.writing():
                    record.states = agreed(lambda: _with_states(out, source))
            agreed(lambda: _record(out, record, earlier))
            on_part(part)
        shards = {part: record.shards[part] for part in part_names(source)}
        manifest = {"format": FORMAT, "quantizer": record.identity["quantizer"], "plan": plan.to_dict()}
        manifest |= {"shards": shards, "code": record.identity["code"]}
        manifest |= {"transformed": transformed} if (transformed := record.identity["transformed"]) else {}
        agreed(lambda: _finish(out, manifest, description))


def _begin(out: Path, record: WriteRecord) -> bool:
    """Makes the record; whether it has calibration states to go on from."""
    _remove_leftovers(out)
    record.write(out)
    return record.states is not None and _whole(out / record.states["file"], record.states)


def _is_kept(record: WriteRecord, part: str, file: Path) -> bool:
    """Whether a part is on disk from before, and whole."""
    return part in record.shards and _whole(file, record.shards[part])


def _with_states(out: Path, source: QuantizedStream) -> dict[str, Any]:
    """Writes the states at which the source stands; what is recorded of them."""
    kept = save_states(out, source)
    return {"file": kept, **_recorded(out / kept)}


def _record(out: Path, record: WriteRecord, earlier: WriteRecord) -> None:
    record.write(out)
    _remove_states(out, but=[earlier.states, record.states])


def _finish(out: Path, manifest: Mapping[str, Any], description: Path) -> None:
    _remove_states(out)
    files = {file.name: sha256(file) for file in _copy_description(description, out)}
    write_text(out / MANIFEST, json.dumps(sealed({**manifest, "files": files}), separators=(",", ":")))
    (out / PROGRESS).unlink()


def check_output(out: str | Path, resume: bool = False) -> None:
    """Whether a quantized checkpoint can be written into `out`, asked before anything expensive. Changes nothing.

    An interrupted write passes with `resume`; that it is one of the same plan, `write_quantized` tests.

    Raises:
      UserError: `out` or a directory above it is a file or not writable, `out` holds something else, or `resume` is
        needed to go on.
    """
    agreed(lambda: _claim(Path(out), None, resume))


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _claim(out: Path, identity: dict[str, Any] | None, resume: bool) -> WriteRecord:
    """What `out` records of this very write, or of any where `identity` is None; a new record where nothing was begun.

    Changes nothing; raises UserError when it is not ours to write.
    """
    _check_place(out)
    if not (out / PROGRESS).exists():
        if (out / MANIFEST).exists():
            raise UserError(f"{out}: already holds a finished checkpoint; give another --out or remove it")
        files = {file for file in out.iterdir() if file.name != LOCK} if out.is_dir() else set()
        if files - set(leftovers(out, PROGRESS)):
            raise UserError(f"{out}: not empty, and no checkpoint of lq; give a new directory")
        if files and not resume:
            raise UserError(f"{out}: a write that was interrupted as it began; add --resume to go on, or remove it")
        return WriteRecord(identity or {})
    record = WriteRecord.read(out)
    if identity is not None and record.identity != identity:
        differing = differences(record.identity, identity)
        raise UserError(f"{out}: an interrupted write of another {differing}; give another --out or remove it")
    if not resume:
        which = "" if identity is None else " of this plan"
        raise UserError(f"{out}: an interrupted write{which}; add --resume to go on with it, or give another --out")
    return record


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
def _taken_back_if_refused(out: Path, parts: list[str], record: WriteRecord):
    """On UserError removes the files made inside it, and goes back to the record of an earlier write.

    Gives that record, the states of which are to be kept until then; a damaged shard of it that was replaced stays so.
    """
    resumed, earlier = (out / PROGRESS).exists(), record.copy()
    files = [file for file in (out / PROGRESS, *(out / shard_name(part) for part in parts)) if not file.exists()]
    try:
        yield earlier
    except UserError:
        if not is_first():
            raise
        for file in files:
            file.unlink(missing_ok=True)
        _remove_states(out, but=[earlier.states])
        if resumed:
            replaced = {part: record.shards[part] for part in earlier.shards}
            dataclasses.replace(earlier, shards=replaced).write(out)
        raise


def _remove_leftovers(out: Path) -> None:
    """Removes the temporary files of a killed process."""
    found = {file for pattern in (*COPIED, shard_name("*")) for file in leftovers(out, pattern)}  # states among them
    for file in found | set(out.glob(SAFETENSORS_OWN)):
        file.unlink()


def _recorded(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _measured(source: ParameterSource, part: str) -> dict[str, Any]:
    """What quantizing the part has shown of its matrices, where it was measured."""
    report = source.report if isinstance(source, QuantizedStream) else {}
    found = {path: errors for path, errors in report.items() if errors and path.split("/")[0] == part}
    return {"measured": found} if found else {}


def _remove_states(out: Path, but: Iterable[Mapping[str, Any] | None] = ()) -> None:
    kept = {states["file"] for states in but if states is not None}
    for file in out.glob(PATTERN):
        if file.name not in kept:
            file.unlink()


def _write_part(source: ParameterSource, part: str, file: Path, planned: Mapping[str, int]) -> dict[str, Any]:
    """What is recorded of the shard. Nothing of the part outlives this function: the next is read when it is gone."""
    tensors = to_tensors(source.part(part))
    _check_sizes(tensors, part, planned)

    def write() -> dict[str, Any]:
        write_tensors(file, tensors)
        return _recorded(file)

    return agreed(write)


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


def _copy_description(source: Path, out: Path) -> list[Path]:
    """Copies what describes the original; the copies."""
    skipped = {f for pattern in NOT_COPIED for f in source.glob(pattern)}
    found = sorted({file for pattern in COPIED for file in source.glob(pattern)} - skipped)
    for file in found:
        write_file(out / file.name, lambda path, f=file: shutil.copyfile(f, path))
    return [out / file.name for file in found]
