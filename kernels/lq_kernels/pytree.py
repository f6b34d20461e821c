"""Dataclasses as pytrees that `jax.export` can write: arrays are children, static facts are JSON."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax


def _plain(value):
    """A dataclass as a dict, a scalar of NumPy as Python's."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value.item()


def register(
    cls: type,
    data_fields: Sequence[str],
    meta_fields: Sequence[str],
    decode: Callable[[dict[str, Any]], dict[str, Any]] = lambda meta: meta,
) -> None:
    """Registers a dataclass as a pytree, and for `jax.export.Exported.serialize`.

    Args:
      decode: turns static facts that have been through JSON (tuples as lists, dataclasses as dicts) into those of the
        dataclass again.
    """
    jax.tree_util.register_dataclass(cls, data_fields=list(data_fields), meta_fields=list(meta_fields))

    def write(aux_data: tuple) -> bytes:
        return json.dumps(dict(zip(meta_fields, aux_data, strict=True)), default=_plain).encode()

    def build(aux_data: tuple, children: Sequence) -> Any:
        return cls(
            **dict(zip(data_fields, children, strict=True)),
            **dict(zip(meta_fields, aux_data, strict=True)),
        )

    def read(serialized: bytes | bytearray) -> tuple:
        meta = decode(json.loads(bytes(serialized)))
        return tuple(meta[name] for name in meta_fields)

    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{cls.__module__}.{cls.__qualname__}",
        serialize_auxdata=write,
        deserialize_auxdata=read,
        from_children=build,
    )
