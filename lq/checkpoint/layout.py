"""The layout of a quantized checkpoint, shared by its writer and its reader.

    lq.json                 manifest: format, plan, quantizer, shards with their size and SHA-256
    embed.safetensors, block_0.safetensors, ..., head.safetensors
    config.json, tokenizer files ...                              copied from the original

A shard holds one part of the parameter tree. A dense leaf is stored under its path, a packed one as three tensors:

    mlp/up_proj/kernel:codes     uint32 [..., words, N], the planes one below the other
    mlp/up_proj/kernel:scales    [..., groups, N]
    mlp/up_proj/kernel:zeros     uint32 [..., groups, words], the planes side by side; absent when symmetric

The manifest is written last: a directory without one is an interrupted write, which `shards.json` lets the writer
resume.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq_kernels import plane_widths, words_along

FORMAT = 1
ITEM_BYTES = {"U32": 4, "BF16": 2, "F16": 2, "F32": 4}


def shard_name(part: str) -> str:
    return f"{part}.safetensors"


def to_tensors(params: Params) -> dict[str, np.ndarray]:
    """The tensors of one shard."""
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/", is_leaf=lambda _, node: isinstance(node, QTensor)).items():
        if not isinstance(leaf, QTensor):
            tensors[path] = np.asarray(leaf)
            continue
        tensors[f"{path}:codes"] = np.concatenate([np.asarray(plane) for plane in leaf.planes], axis=-2)
        tensors[f"{path}:scales"] = np.asarray(leaf.scales)
        if leaf.zeros is not None:
            tensors[f"{path}:zeros"] = np.concatenate([np.asarray(plane) for plane in leaf.zeros], axis=-1)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def from_tensors(tensors: dict[str, np.ndarray], specs: dict[str, tuple[QuantSpec, tuple[int, ...]]], dtype) -> Params:
    """The part's parameters; `specs` gives spec and logical shape of every packed leaf, by path within the part."""
    leaves: dict[str, Any] = {}
    for path, (spec, shape) in specs.items():
        codes, scales = tensors[f"{path}:codes"], tensors[f"{path}:scales"]
        zeros = tensors.get(f"{path}:zeros")
        leaves[path] = QTensor(
            planes=_split(codes, [words_along(shape[-2], width) for width in plane_widths(spec.bits)], -2),
            scales=jnp.asarray(scales),
            zeros=None
            if zeros is None
            else _split(zeros, [words_along(shape[-1], w) for w in plane_widths(spec.bits)], -1),
            spec=spec,
            shape=shape,
        )
    for name, tensor in tensors.items():
        if ":" not in name:
            leaves[name] = jnp.asarray(tensor if dtype is None else tensor.astype(dtype))
    return unflatten_dict(leaves, sep="/")


def expected_tensors(shapes: dict[str, tuple[int, ...]], specs: dict[str, tuple[QuantSpec, tuple[int, ...]]]):
    """Name -> shape of every tensor of a shard whose dense leaves are `shapes`; headers are checked against it."""
    expected = dict(shapes)
    for path, (spec, shape) in specs.items():
        *lead, K, N = shape
        widths = plane_widths(spec.bits)
        groups = spec.num_groups(K)
        expected[f"{path}:codes"] = (*lead, sum(words_along(K, w) for w in widths), N)
        expected[f"{path}:scales"] = (*lead, groups, N)
        if not spec.symmetric:
            expected[f"{path}:zeros"] = (*lead, groups, sum(words_along(N, w) for w in widths))
    return expected


def shard_records(value: Any) -> dict[str, dict]:
    """What a manifest or `shards.json` says of each shard, `{"bytes": int, "sha256": str}` by part.

    Raises ValueError when it is anything else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"shards: {value!r} is no object")
    for part, record in value.items():
        fields = record if isinstance(record, dict) else {}
        if type(fields.get("bytes")) is not int or not isinstance(fields.get("sha256"), str):
            raise ValueError(f"shards: {part}: no bytes and sha256")
    return value


def leaf_bytes(shard: Path) -> dict[str, int]:
    """Bytes of every leaf in a shard, the arrays of a packed one together; read from the header alone."""
    found: dict[str, int] = {}
    opened = safe_open(shard, framework="numpy")
    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
        stored = opened.get_slice(name)
        leaf = name.partition(":")[0]
        found[leaf] = found.get(leaf, 0) + ITEM_BYTES[stored.get_dtype()] * math.prod(stored.get_shape())
    return found


def leaf_path(matrix: str) -> str:
    """Path within its part of the leaf that holds a matrix: `block_0/mlp/up_proj` -> `mlp/up_proj/kernel`."""
    keys = matrix.split("/")[1:]
    return "/".join([*keys, "embedding" if matrix.startswith("embed/") else "kernel"])


def _split(words: np.ndarray, lengths: list[int], axis: int) -> tuple[jax.Array, ...]:
    pieces = np.split(words, np.cumsum(lengths)[:-1], axis=axis)
    return tuple(jnp.asarray(np.ascontiguousarray(piece)) for piece in pieces)
