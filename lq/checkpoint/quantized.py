"""Reading a quantized checkpoint, one part at a time, every shard checked against its checksum."""

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
    leaf_path,
    shard_name,
)
from lq.checkpoint.write import part_names, sha256
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.decoder import abstract_params
from lq.models.loading import MANIFEST, PROGRESS, read_config
from lq.models.matrices import model_shapes
from lq.models.source import ParameterSource, Params


def open_quantized(path: str | Path) -> "QuantizedCheckpoint":
    """Opens a quantized checkpoint: manifest, config, and every shard's size and header. Reads no weights.

    Raises:
      UserError: no such checkpoint, an interrupted or damaged one, or shards that do not fit the manifest.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        if (path / PROGRESS).is_file():
            raise UserError(f"{path}: quantization was interrupted; run the same `lq quantize` again with --resume")
        raise UserError(f"{path}: no quantized checkpoint ({MANIFEST} is missing); make one with `lq quantize`")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, plan = manifest["format"], Plan.from_dict(manifest["plan"])
        shards, quantizer = manifest["shards"], manifest["quantizer"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: damaged ({error!r}); quantize again") from None
    if version != FORMAT:
        raise UserError(f"{path / MANIFEST}: format {version}, this lq reads {FORMAT}; quantize again")
    config = read_config(path)
    if plan.shapes != model_shapes(config):
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

    def part(self, name: str, dtype=None) -> Params:
        """Raises UserError when the shard is not the one that was written."""
        file = self.path / shard_name(name)
        if name not in self._verified:
            if sha256(file) != self._shards[name]["sha256"]:
                raise UserError(f"{file}: checksum does not match {MANIFEST}; copy the file again or quantize again")
            self._verified.add(name)
        opened = safe_open(file, framework="numpy")
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
        return from_tensors(tensors, self._specs(name), dtype)

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
    bits = weights = 0
    for path in checkpoint.plan.counted():
        file = checkpoint.path / shard_name(path.split("/")[0])
        leaf = leaf_path(path)
        opened = safe_open(file, framework="numpy")
        for name in opened.keys():  # noqa: SIM118
            if name == leaf or name.startswith(f"{leaf}:"):
                tensor = opened.get_tensor(name)
                bits += 8 * tensor.nbytes
        weights += math.prod(checkpoint.plan.shapes[path])
    return bits / weights
