"""The layout of a quantized checkpoint, shared by its writer and its reader.

    lq.json                 manifest: format, plan, quantizer, code, shards with their size, SHA-256 and measured
                            errors; SHA-256 of the files below, and of itself; of a transformed model, the fields of its
                            config that are not as in config.json
    embed.safetensors, block_0.safetensors, ..., head.safetensors
    config.json, tokenizer files ...                              copied from the original

A shard holds one part of the parameter tree. A dense leaf is stored under its path, a packed one as several tensors:

    mlp/up_proj/kernel:codes     uint32 [..., words, N], the planes one below the other
    mlp/up_proj/kernel:scales    [..., groups, N]
    mlp/up_proj/kernel:zeros     uint32 [..., groups, words], the planes side by side; `[..., groups, N]` where zero
                                 points have a dtype of their own; absent when symmetric
    mlp/up_proj/kernel:permutation, :widths     of a mixed matrix: uint16 [K], and uint8, the width of every run of 128
                                 channels; its codes are those of its segments one below the other, its zeros flat
    mlp/up_proj/kernel:group     of a matrix with groups by energy, instead: uint8 [K], the group of every channel;
                                 uint16 beyond 256 groups
    mlp/up_proj/kernel:left:codes, :left:scales, :right:codes, :right:scales     the factors of a low-rank residual

The manifest is written last: a directory without one is an interrupted write, which `shards.json` lets the writer
resume.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import (
    Packed,
    SegmentedQTensor,
    check_widths,
    is_packed,
    run_channels,
    runs_of,
)
from lq.numerics.sharded import to_host
from lq.numerics.spec import SEGMENT_CHANNELS, QuantSpec
from lq_kernels import plane_widths, words_along

FORMAT = 1
FACTORS = ("left", "right")  # of a low-rank residual
ITEM_BYTES = {"U8": 1, "U16": 2, "U32": 4, "BF16": 2, "F16": 2, "F32": 4}


def shard_name(part: str) -> str:
    return f"{part}.safetensors"


def to_tensors(params: Params) -> dict[str, np.ndarray]:
    """The tensors of one shard."""
    tensors = {}
    leaves: dict[str, Any] = flatten_dict(params, sep="/", is_leaf=lambda _, node: is_packed(node))
    for path, leaf in leaves.items():
        if not is_packed(leaf):
            tensors[path] = to_host(leaf)
            continue
        tensors |= _packed_tensors(path, leaf)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _packed_tensors(path: str, leaf: Packed) -> dict[str, np.ndarray]:
    if isinstance(leaf, SegmentedQTensor):
        return _segmented_tensors(path, leaf)
    tensors = {
        f"{path}:codes": np.concatenate([to_host(plane) for plane in leaf.planes], axis=-2),
        f"{path}:scales": to_host(leaf.scales),
    }
    if isinstance(leaf.zeros, tuple):
        tensors[f"{path}:zeros"] = np.concatenate([to_host(plane) for plane in leaf.zeros], axis=-1)
    elif leaf.zeros is not None:
        tensors[f"{path}:zeros"] = to_host(leaf.zeros)
    for name, factor in zip(FACTORS, leaf.residual or (), strict=False):
        tensors |= _packed_tensors(f"{path}:{name}", factor)
    return tensors


def _segmented_tensors(path: str, leaf: SegmentedQTensor) -> dict[str, np.ndarray]:
    planes = [to_host(plane) for segment in leaf.segments for plane in segment.planes]
    tensors = {
        f"{path}:codes": np.concatenate(planes, axis=-2),
        f"{path}:scales": np.concatenate([to_host(segment.scales) for segment in leaf.segments], axis=-2),
    }
    if leaf.spec.mixed:
        tensors |= {
            f"{path}:permutation": to_host(leaf.channels),
            f"{path}:widths": np.asarray(leaf.widths, np.uint8),
        }
    else:
        tensors[f"{path}:group"] = to_host(leaf.channels)
    if not leaf.spec.symmetric:
        zeros = [to_host(plane).ravel() for segment in leaf.segments for plane in segment.zeros or ()]
        tensors[f"{path}:zeros"] = np.concatenate(zeros)
    return tensors


def on_default_device(path: str, leaf: Any) -> Any:
    """A leaf of a part, whatever its path."""
    return jax.tree.map(jnp.asarray, leaf)


def from_tensors(
    tensors: dict[str, np.ndarray],
    specs: dict[str, tuple[QuantSpec, tuple[int, ...]]],
    dtype,
    place: Callable[[str, Any], Any] = on_default_device,
) -> Params:
    """The part's parameters.

    Args:
      tensors: of its shard.
      specs: spec and logical shape of every packed leaf, by path within the part.
      dtype: of dense leaves; as they are stored when None.
      place: puts a leaf, by its path, from the host where it belongs.
    """
    leaves: dict[str, Any] = {}
    for path, (spec, shape) in specs.items():
        leaves[path] = place(path, _from_packed(tensors, path, spec, shape))
    for name, tensor in tensors.items():
        if ":" not in name:
            leaves[name] = place(name, tensor if dtype is None else tensor.astype(dtype))
    return unflatten_dict(leaves, sep="/")


def _from_segments(tensors, path: str, spec: QuantSpec, shape: tuple[int, ...]) -> SegmentedQTensor:
    """The inverse of `_segmented_tensors`. Raises ValueError for widths that are not those of the spec."""
    stored = tuple(int(width) for width in tensors[f"{path}:widths"]) if spec.mixed else None
    widths = stored or spec.widths or (spec.bits,)
    try:
        check_widths(widths, spec, shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    channels = tensors[f"{path}:permutation" if spec.mixed else f"{path}:group"]
    N, segments, word, zero = shape[1], [], 0, 0
    for bits, first, stop in runs_of(widths, run_channels(spec, shape[0])):
        groups = slice(first // spec.group_length(shape[0]), stop // spec.group_length(shape[0]))
        lengths = [words_along(stop - first, p) for p in plane_widths(bits)]
        planes = _split(tensors[f"{path}:codes"][word : word + sum(lengths)], lengths, -2)
        zeros, word = None, word + sum(lengths)
        if not spec.symmetric:
            shapes = [(groups.stop - groups.start, words_along(N, p)) for p in plane_widths(bits)]
            ends = np.cumsum([zero, *map(math.prod, shapes)])
            flat = tensors[f"{path}:zeros"]
            zeros = tuple(flat[a:b].reshape(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False))
            zero = int(ends[-1])
        scales = tensors[f"{path}:scales"][groups]
        segments.append(QTensor(planes, scales, zeros, spec.segment(bits), (stop - first, N)))
    return SegmentedQTensor(tuple(segments), channels, spec, shape)


def _from_packed(tensors, path: str, spec: QuantSpec, shape: tuple[int, ...]) -> Packed:
    """A packed leaf whose arrays are still on the host."""
    if spec.mixes(shape) or spec.orders(shape):
        return _from_segments(tensors, path, spec, shape)
    widths = plane_widths(spec.bits)
    zeros = None if spec.symmetric else tensors[f"{path}:zeros"]
    if zeros is not None and spec.zero_dtype is None:
        zeros = _split(tensors[f"{path}:zeros"], [words_along(shape[-1], width) for width in widths], -1)
    factors: list[Any] = [
        _from_packed(tensors, f"{path}:{name}", *factor)
        for name, factor in zip(FACTORS, spec.residual(shape), strict=False)
    ]
    return QTensor(
        planes=_split(tensors[f"{path}:codes"], [words_along(shape[-2], width) for width in widths], -2),
        scales=tensors[f"{path}:scales"],
        zeros=zeros,
        spec=spec,
        shape=shape,
        residual=(factors[0], factors[1]) if factors else None,
    )


def expected_tensors(shapes: dict[str, tuple[int, ...]], specs: dict[str, tuple[QuantSpec, tuple[int, ...]]]):
    """Name -> shape of every tensor of a shard whose dense leaves are `shapes`; headers are checked against it."""
    expected = dict(shapes)
    for path, (spec, shape) in specs.items():
        *lead, K, N = shape
        if spec.orders(shape):
            expected |= _expected_segments(path, spec, shape)
            continue
        widths = plane_widths(spec.bits)
        groups = spec.num_groups(K)
        expected[f"{path}:codes"] = (*lead, sum(words_along(K, w) for w in widths), N)
        expected[f"{path}:scales"] = (*lead, groups, N)
        if spec.mixes(shape):
            expected[f"{path}:permutation"] = (K,)
            expected[f"{path}:widths"] = (K // SEGMENT_CHANNELS,)
            if not spec.symmetric:
                expected[f"{path}:zeros"] = (groups * spec.bits * N // 32,)
        elif not spec.symmetric:
            stored = N if spec.zero_dtype is not None else sum(words_along(N, w) for w in widths)
            expected[f"{path}:zeros"] = (*lead, groups, stored)
        factors = zip(FACTORS, spec.residual(shape), strict=False)
        expected |= expected_tensors({}, {f"{path}:{name}": factor for name, factor in factors})
    return expected


def _expected_segments(path: str, spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a matrix with groups by energy."""
    widths = spec.widths or (spec.bits,)
    spec.check_segments(shape)
    (K, N), planes = shape, [plane for bits in widths for plane in plane_widths(bits)]
    run = run_channels(spec, K)
    found: dict[str, tuple[int, ...]] = {
        f"{path}:codes": (sum(words_along(run, plane) for plane in planes), N),
        f"{path}:scales": (spec.num_groups(K), N),
        f"{path}:group": (K,),
    }
    if not spec.symmetric:
        found[f"{path}:zeros"] = (spec.num_groups(run) * sum(words_along(N, plane) for plane in planes),)
    return found


def shard_records(value: Any) -> dict[str, dict]:
    """What a manifest or `shards.json` says of each shard by part: `{"bytes": int, "sha256": str}`, and perhaps
    `"measured"`, the errors of its matrices by path.

    Raises ValueError when it is anything else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"shards: {value!r} is no object")
    for part, record in value.items():
        fields = record if isinstance(record, dict) else {}
        if type(fields.get("bytes")) is not int or not isinstance(fields.get("sha256"), str):
            raise ValueError(f"shards: {part}: no bytes and sha256")
        measured = fields.get("measured", {})
        if not isinstance(measured, dict) or not all(isinstance(errors, dict) for errors in measured.values()):
            raise ValueError(f"shards: {part}: measured is no object of objects")
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


def _split(words: np.ndarray, lengths: list[int], axis: int) -> Any:
    """Planes, still on the host."""
    pieces = np.split(words, np.cumsum(lengths)[:-1], axis=axis)
    return tuple(np.ascontiguousarray(piece) for piece in pieces)
