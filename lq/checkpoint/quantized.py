"""Reading a quantized checkpoint, one part at a time, every shard checked against its checksum."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from lq.allocation.plan import Plan
from lq.checkpoint.layout import (
    FORMAT,
    expected_tensors,
    from_tensors,
    leaf_bytes,
    leaf_path,
    shard_name,
    shard_records,
)
from lq.checkpoint.transformed import from_json
from lq.checkpoint.write import sha256
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.decoder import abstract_params
from lq.models.layout import placed_leaf
from lq.models.loading import MANIFEST, PROGRESS, read_config
from lq.models.matrices import model_shapes, other_weights
from lq.models.source import ParameterSource, Params, part_names
from lq.sealed import unsealed


def open_quantized(path: str | Path) -> "QuantizedCheckpoint":
    """Opens a quantized checkpoint: manifest, the files beside it, every shard's size and header. Reads no weights.

    Raises:
      UserError: no such checkpoint, an interrupted or damaged one, or shards that do not fit the manifest.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        if (path / PROGRESS).is_file():
            raise UserError(f"{path}: quantization was interrupted; run the same `lq quantize` again with --resume")
        raise UserError(f"{path}: no quantized checkpoint ({MANIFEST} is missing); make one with `lq quantize`")
    plan, quantizer, shards, files, transformed = _read_manifest(path / MANIFEST)
    for name, checksum in files.items():
        if not (path / name).is_file() or sha256(path / name) != checksum:
            raise UserError(f"{path / name}: not as it was when it was quantized; copy it again from the original")
    config = dataclasses.replace(read_config(path), **transformed)
    if plan.shapes != model_shapes(config) or plan.other_weights != other_weights(config):
        raise UserError(
            f"{path / 'config.json'}: of another model than {MANIFEST}; copy the original's or quantize again"
        )
    checkpoint = QuantizedCheckpoint(path, config, plan, quantizer, shards)
    for part in part_names(checkpoint):
        checkpoint.check(part)
    return checkpoint


class QuantizedCheckpoint(ParameterSource):
    """An opened quantized checkpoint. Made by `open_quantized`."""

    def __init__(self, path: Path, config: ModelConfig, plan: Plan, quantizer: dict, shards: dict):
        self.path, self.config, self.plan, self.quantizer = path, config, plan, quantizer
        self._shards = shards
        self._abstract = abstract_params(config)
        self._verified: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the shards on disk, headers included."""
        return sum((self.path / shard_name(part)).stat().st_size for part in part_names(self))

    @property
    def measured(self) -> dict[str, dict[str, float]]:
        """What quantizing has shown of every matrix, by path; see `lq.quantizers.described`. Empty where it was not."""
        return {path: errors for shard in self._shards.values() for path, errors in shard.get("measured", {}).items()}

    def part(self, name: str, dtype=None) -> Params:
        """On the mesh in force, if any. Raises UserError when the shard is not the one that was written."""
        file = self.path / shard_name(name)
        if name not in self._verified:
            if sha256(file) != self._shards[name]["sha256"]:
                raise UserError(f"{file}: checksum does not match {MANIFEST}; copy the file again or quantize again")
            self._verified.add(name)
        opened = safe_open(file, framework="numpy")
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
        place = lambda path, leaf: placed_leaf(self.config, f"{name}/{path}", leaf)  # noqa: E731
        return from_tensors(tensors, self._specs(name), dtype, place)

    def check(self, part: str) -> None:
        """Raises UserError unless the shard is there, whole by its size, and holds what the plan says."""
        file = self.path / shard_name(part)
        if part not in self._shards or not file.is_file():
            raise UserError(f"{file}: missing; copy it there or quantize again")
        size = file.stat().st_size
        if size != self._shards[part]["bytes"]:
            raise UserError(f"{file}: {size} bytes, {MANIFEST} says {self._shards[part]['bytes']}; copy it again")
        try:
            opened = safe_open(file, framework="numpy")
            found = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged ({error}); copy it again or quantize again") from None
        specs = self._specs(part)
        expected = expected_tensors(self._dense_shapes(part, specs), specs)
        if found != expected:
            name = next(iter(sorted(found.items() ^ expected.items())))[0]
            raise UserError(f"{file}: tensor {name} does not fit the plan in {MANIFEST}; quantize again")

    def _specs(self, part: str):
        mine = [p for p in self.plan.specs if p == part or p.startswith(f"{part}/")]
        return {leaf_path(p): (self.plan.specs[p], self.plan.shapes[p]) for p in mine}

    def _dense_shapes(self, part: str, packed) -> dict[str, tuple[int, ...]]:
        leaves: dict[str, Any] = flatten_dict(self._abstract[part], sep="/")
        return {path: tuple(leaf.shape) for path, leaf in leaves.items() if path not in packed}


def measured_bits_per_weight(checkpoint: QuantizedCheckpoint) -> float:
    """Bits per counted weight from the arrays as they lie in the shards; equal to the plan's `bpw`."""
    stored = {part: leaf_bytes(checkpoint.path / shard_name(part)) for part in part_names(checkpoint)}
    counted = checkpoint.plan.counted()
    nbytes = sum(stored[path.split("/")[0]][leaf_path(path)] for path in counted)
    return 8 * nbytes / sum(math.prod(checkpoint.plan.shapes[path]) for path in counted)


def _read_manifest(file: Path) -> tuple[Plan, dict, dict[str, dict], dict[str, str], dict[str, Any]]:
    """Plan, quantizer, shards, checksums of the files that describe the model, and what transforms changed of it.

    Raises UserError when the file is damaged or of another format.
    """
    try:
        manifest = unsealed(json.loads(file.read_text(encoding="utf-8")))
        if (version := manifest["format"]) == FORMAT:
            plan, shards = Plan.from_dict(manifest["plan"]), shard_records(manifest["shards"])
            files = {Path(name).name: str(checksum) for name, checksum in manifest.get("files", {}).items()}
            return plan, dict(manifest["quantizer"]), shards, files, from_json(manifest.get("transformed", {}))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:  # ValueError: JSON's and UserError
        raise UserError(f"{file}: damaged ({error!r}); quantize again") from None
    raise UserError(f"{file}: format {version!r}, this lq reads {FORMAT}; quantize again")
