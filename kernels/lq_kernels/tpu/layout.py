"""`prepare` and its inverse: canonical planes to words in the order of `fields`, per device generation.

Arrays of a segment, Kp and Np being K and N rounded up to whole chunks and to 128, Gp the groups in Kp rounded up to 8:

    words   tuple of int32 [Kp / 256 * words of the scheme, Np]; two for 8 bits on v4, low and high halves of the codes
    scales  [Gp, Np], bfloat16 or float32
    zeros   [Gp, Np], bfloat16 or float32, or None

Padding is zero: padded channels meet zeros in x, padded groups have the scale zero.
"""

import functools
import math
import operator
import re
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from lq_kernels.backend import Segment, segment_of
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import pack, unpack
from lq_kernels.tpu.fields import CHUNK, TILE_ROWS, Scheme, scheme

LANES = 128
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "v7x")
GOALS = ("speed", "memory")  # how a target may end, after a dash, to ask for other than the generation's choice

# Bits of the container by width 1..8; "w": stored as wide as the container. Chosen by the static cost of the compiled
# kernels (bench/tpu_cost.py); sixteen bits is the one choice that every generation compiles well.
_CHOICES = {
    "v4": "16 16 16 16 16 16 16 2x16",
    "v5e": "16 16 16 16 16 16 16 8",
    "v5p": "16 16 16 16 16 16 16 8",
    "v6e": "4 4 4 4 8 8 8 8",
    "v7x": "4 4 4 4 8 8 8 8",
    "tpu": "16 16 16 16 16 16 16 2x16",
}


def target_of(device_kind: str | None) -> str:
    """The generation, as our tables call it; "tpu" when it is not known."""
    kind = re.sub(r"[^a-z0-9]", "", (device_kind or "").lower()).removeprefix("tpu")
    names = {"v4": "v4", "v5lite": "v5e", "v5e": "v5e", "v5": "v5p", "v5p": "v5p", "v6lite": "v6e", "v6e": "v6e"}
    return "v7x" if kind.startswith(("7", "v7")) else names.get(kind, "tpu")


def schemes(bits: int, target: str) -> tuple[Scheme, ...]:
    """The scheme of each words array: one, or two of four bits."""
    generation, _, goal = target.partition("-")
    choice = _CHOICES[generation].split()[bits - 1]
    if choice == "2x16":
        return (scheme(4, 16), scheme(4, 16))
    widened = choice.endswith("w") if not goal else goal == "speed"
    container = int(choice.rstrip("w"))
    return (scheme(bits, container, widened and container < 16 and bits < container),)


def prepare(segments: tuple[PackedMatrix, ...], target: str) -> tuple[dict, ...]:
    return tuple(_prepare_segment(segment, target) for segment in segments)


def _prepare_segment(w: PackedMatrix, target: str) -> dict:
    codes = unpack(w.planes, w.bits, w.in_features)
    rows, columns = padded(w.in_features, CHUNK), padded(w.out_features, LANES)
    codes = jnp.pad(codes, ((0, rows - w.in_features), (0, columns - w.out_features)))
    parts = schemes(w.bits, target)
    words = tuple(store(codes >> 4 * i & 15 if len(parts) > 1 else codes, s) for i, s in enumerate(parts))
    return {
        "words": words,
        "scales": _pad_groups(w.scales, segment_of(w), exact_dtype(str(w.scales.dtype))),
        "zeros": None if w.zeros is None else _pad_groups(w.zeros, segment_of(w), exact_dtype(str(w.zeros.dtype))),
    }


def restore(arrays: tuple[dict, ...], segments: tuple[Segment, ...], columns: int, target: str):
    """The `PackedMatrix` of each segment, exactly as prepared."""
    return tuple(_restore_segment(a, s, columns, target) for a, s in zip(arrays, segments, strict=True))


def _restore_segment(arrays: dict, segment: Segment, columns: int, target: str) -> PackedMatrix:
    parts = schemes(segment.bits, target)
    halves = [load(w, s) << 4 * i for i, (w, s) in enumerate(zip(arrays["words"], parts, strict=True))]
    codes = functools.reduce(operator.or_, halves)
    zeros = arrays["zeros"]
    return PackedMatrix(
        planes=pack(codes[: segment.in_features, :columns], segment.bits),
        scales=arrays["scales"][: segment.groups, :columns].astype(segment.scale_dtype),
        zeros=None if zeros is None else zeros[: segment.groups, :columns].astype(segment.zero_dtype),
        zero_point=segment.zero_point,
        bits=segment.bits,
        group_size=segment.group_size,
        in_features=segment.in_features,
    )


def store(codes: Array, s: Scheme) -> Array:
    """uint32 codes `[Kp, Np]` as int32 words `[Kp / 256 * words, Np]`."""
    if s.signed:
        codes = codes ^ (1 << s.bits - 1)
    lanes = 32 // s.container
    codes = codes.reshape(-1, len(s.pieces), TILE_ROWS, lanes, codes.shape[1])
    tiles: list[Any] = [0] * s.stored_tiles
    for i, pieces in enumerate(s.pieces):
        for p in pieces:
            bits = (codes[:, i] >> p.low) & ((1 << p.width) - 1)
            for lane in range(lanes):
                tiles[p.tile] |= bits[:, :, lane] << (p.place + lane * s.container)
    return lax.bitcast_convert_type(jnp.stack(tiles, 1).reshape(-1, codes.shape[-1]), jnp.int32)


def load(words: Array, s: Scheme) -> Array:
    """Inverse of `store`: uint32 codes."""
    lanes = 32 // s.container
    tiles = lax.bitcast_convert_type(words, jnp.uint32).reshape(-1, s.stored_tiles, TILE_ROWS, 1, words.shape[1])
    shifts = (s.container * jnp.arange(lanes, dtype=jnp.uint32))[:, None]
    codes = [
        sum((tiles[:, p.tile] >> (p.place + shifts) & ((1 << p.width) - 1)) << p.low for p in pieces)
        for pieces in s.pieces
    ]
    codes = jnp.stack(codes, 1).reshape(-1, words.shape[1])
    return codes ^ (1 << s.bits - 1) if s.signed else codes


def padded_groups(segment: Segment) -> int:
    """Rows of scales and zeros, whole registers of them."""
    size = min(segment.group_size, padded(segment.in_features, CHUNK))
    return padded(max(segment.groups, padded(segment.in_features, CHUNK) // size), TILE_ROWS)


def exact_dtype(name: str) -> str:
    """A dtype the kernel reads that holds every number of dtype `name`; the numbers of int32 zeros are small."""
    return "bfloat16" if name in ("bfloat16", "uint8", "int8", "uint4", "int4", "uint2", "int2", "bool") else "float32"


def _pad_groups(values: Array, segment: Segment, dtype: str) -> Array:
    missing = (0, padded_groups(segment) - segment.groups), (0, padded(values.shape[1], LANES) - values.shape[1])
    return jnp.pad(values.astype(dtype), missing)


def padded(length: int, unit: int) -> int:
    return math.ceil(length / unit) * unit
