"""What transforms changed in a model's config, as a manifest records it: field -> value as JSON.

A checkpoint keeps the original's config.json. The config of a transformed model differs from it in a few fields, never
in sizes; the two together describe what the shards hold.
"""

import dataclasses
from typing import Any, get_args

from lq.models.config import ModelConfig, NormKind, Rotation

NORMS, SWITCHES = ("norm", "final_norm"), ("center_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias")
CHANGEABLE = (*NORMS, *SWITCHES, "rotation")


def differing_fields(original: ModelConfig, config: ModelConfig) -> list[str]:
    """Names of the fields in which two configs differ."""
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if getattr(original, name) != getattr(config, name)]


def to_json(original: ModelConfig, config: ModelConfig) -> dict[str, Any]:
    """The `CHANGEABLE` fields in which a transformed model's config differs from the original's."""
    changed = {name: getattr(config, name) for name in differing_fields(original, config) if name in CHANGEABLE}
    return {name: dataclasses.asdict(v) if isinstance(v, Rotation) else v for name, v in changed.items()}


def from_json(value: Any) -> dict[str, Any]:
    """Arguments for `dataclasses.replace` of the original's config. Raises ValueError when `value` is anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"transformed: {value!r} is no object")
    return {name: _field(name, given) for name, given in value.items()}


def _field(name: str, given: Any) -> Any:
    if name in NORMS and given in get_args(NormKind):
        return given
    if name in SWITCHES and isinstance(given, bool):
        return given
    if name == "rotation" and _is_rotation(given):
        return Rotation(**given)
    raise ValueError(f"transformed: {name}: {given!r}")


def _is_rotation(given: Any) -> bool:
    types = {field.name: field.type for field in dataclasses.fields(Rotation)}
    return isinstance(given, dict) and {name: type(value) for name, value in given.items()} == types
