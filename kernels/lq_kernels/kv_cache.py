"""A quantized key/value cache, KIVI (arXiv 2402.02750): keys per channel, values per token, the newest as they came.

Keys have channels that are large for every token, so a key's scale belongs to one channel and a run of `group_size`
tokens; values have none, and attention sums them over tokens, so a value's scale belongs to one token and a run of
channels. Both are rounded to the nearest of 2**bits levels between the group's least and largest value:

    x' = code * scale + zero,   |x - x'| <= scale / 2

Scale and zero are bfloat16. The zero is rounded down and the scale up before the codes are chosen, so nothing is
clipped and the bound holds with the stored scale. With 32 values to a group a value costs bits + 1 bits.

A key's group can be rounded only when its last token is there, so the newest tokens wait in full precision: slot t of
the text in ring slot t % W, W = min(residual, capacity). A group is quantized when the next token would overwrite its
first one: of n tokens written the first `quantized(n)` are in the packed part, the last W - group_size + 1 to W in the
ring. (KIVI empties its key residual at once when it reaches `residual` tokens, and moves values one by one.) Which
tokens are rounded, and with whom, depends on n alone, not on how the text was cut into calls.

Shapes: B batch, S new tokens, H key/value heads, C head channels, N groups along the text, G = `group_size`. Codes are
packed along tokens, in the words of `packing`. Everything is static but the number of tokens written.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from lq_kernels.packing import pack, packed_bits, plane_widths, unpack, words_along


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """How a cache is quantized. The defaults are KIVI's."""

    bits: int  # 1 to 8
    group_size: int = 32  # tokens (keys) or channels (values) that share scale and zero
    residual: int = 128  # tokens kept in full precision; no fewer than a group

    def __post_init__(self):
        plane_widths(self.bits)  # refuses widths outside 1..8
        if not 1 <= self.group_size <= self.residual:
            raise ValueError(f"a residual of {self.residual} tokens cannot hold a group of {self.group_size}")

    def value_group(self, channels: int) -> int:
        """Channels that share a value's scale: the whole head where it is no multiple of `group_size`."""
        return self.group_size if channels % self.group_size == 0 else channels

    def window(self, capacity: int) -> int:
        """Slots of the ring."""
        return min(self.residual, capacity)

    def groups(self, capacity: int) -> int:
        """Groups of the packed part that `capacity` tokens can fill."""
        return math.ceil((capacity - self.window(capacity)) / self.group_size)

    def quantized(self, written: Array, capacity: int) -> Array:
        """How many of the first `written` tokens are in the packed part."""
        beyond = jnp.maximum(written - self.window(capacity), 0)
        return (beyond + self.group_size - 1) // self.group_size * self.group_size

    def nbytes(self, batch: int, capacity: int, heads: int, channels: int, dtype) -> int:
        """Bytes of a `QuantizedKVCache`: codes, scales and zeros of both, and the ring in `dtype`."""
        G, groups = self.group_size, batch * self.groups(capacity) * heads
        codes = 2 * groups * packed_bits((G, channels), self.bits) // 8
        scales_and_zeros = 2 * 2 * groups * (channels + G * channels // self.value_group(channels))
        ring = 2 * batch * self.window(capacity) * heads * channels * jnp.dtype(dtype).itemsize
        return codes + scales_and_zeros + ring


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedGroups:
    """Keys or values of N groups of G tokens."""

    planes: tuple[Array, ...]  # uint32 [B, N, words, H, C] each
    scales: Array  # bfloat16; keys [B, N, 1, H, C], values [B, N, G, H, runs of channels]
    zeros: Array  # as scales

    def dequantize(self, spec: KVCacheSpec, dtype=jnp.float32) -> Array:
        """`[B, N * G, H, C]`, computed in float32 and rounded once to `dtype`."""
        B, N, _, H, C = self.planes[0].shape
        flat = tuple(plane.reshape(B, N, -1, H * C) for plane in self.planes)
        codes = unpack(flat, spec.bits, spec.group_size).reshape(B, N, spec.group_size, H, C)
        run = C // self.scales.shape[-1]
        scales, zeros = (jnp.repeat(a.astype(jnp.float32), run, axis=-1) for a in (self.scales, self.zeros))
        return (codes.astype(jnp.float32) * scales + zeros).astype(dtype).reshape(B, -1, H, C)


jax.tree_util.register_dataclass(PackedGroups, data_fields=["planes", "scales", "zeros"], meta_fields=[])


def quantize_keys(k: Array, valid: Array, spec: KVCacheSpec) -> PackedGroups:
    """Rounds `k [B, N, G, H, C]` per channel. A token where `valid [B, N, G]` is false does not widen its group."""
    codes, scales, zeros = _round(k.astype(jnp.float32), valid[..., None, None], 2, spec.bits)
    return PackedGroups(planes=_pack(codes, spec.bits), scales=scales, zeros=zeros)


def quantize_values(v: Array, spec: KVCacheSpec) -> PackedGroups:
    """Rounds `v [B, N, G, H, C]` per token."""
    *lead, C = v.shape
    runs = v.astype(jnp.float32).reshape(*lead, -1, spec.value_group(C))
    codes, scales, zeros = _round(runs, jnp.ones_like(runs, bool), -1, spec.bits)
    return PackedGroups(planes=_pack(codes.reshape(v.shape), spec.bits), scales=scales[..., 0], zeros=zeros[..., 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedKVCache:
    """Keys and values of one block, `capacity` tokens a row; slot t holds the t-th token fed, padding included."""

    keys: PackedGroups
    values: PackedGroups
    recent_k: Array  # [B, W, H, C] in the dtype of the computation
    recent_v: Array
    spec: KVCacheSpec
    capacity: int

    @classmethod
    def empty(
        cls, spec: KVCacheSpec, batch: int, capacity: int, heads: int, channels: int, dtype
    ) -> "QuantizedKVCache":
        """Room for `capacity` tokens a row, none written."""
        G, N = spec.group_size, spec.groups(capacity)
        words = [words_along(G, width) for width in plane_widths(spec.bits)]

        def groups(*scales: int) -> PackedGroups:
            return PackedGroups(
                planes=tuple(jnp.zeros((batch, N, rows, heads, channels), jnp.uint32) for rows in words),
                scales=jnp.zeros((batch, N, *scales), jnp.bfloat16),
                zeros=jnp.zeros((batch, N, *scales), jnp.bfloat16),
            )

        ring = (batch, spec.window(capacity), heads, channels)
        return cls(
            keys=groups(1, heads, channels),
            values=groups(G, heads, channels // spec.value_group(channels)),
            recent_k=jnp.zeros(ring, dtype),
            recent_v=jnp.zeros(ring, dtype),
            spec=spec,
            capacity=capacity,
        )

    @property
    def groups(self) -> int:
        """Groups the packed part has room for."""
        return self.keys.scales.shape[1]

    def quantized(self, written: Array) -> Array:
        """How many of the first `written` tokens are in the packed part."""
        return self.spec.quantized(written, self.capacity)

    def ring_slots(self, written: Array) -> Array:
        """The slot of the text each ring slot holds, `[W]`; `capacity` where it holds none that is not packed."""
        ring = jnp.arange(self.recent_k.shape[1])
        slots = written - 1 - (written - 1 - ring) % ring.size
        return jnp.where(slots >= self.quantized(written), slots, self.capacity)

    def read(self, first: Array, count: int, dtype) -> tuple[Array, Array]:
        """Keys and values of `count` groups from group `first` on, `[B, count * G, H, C]` each."""

        def groups(of: PackedGroups) -> Array:
            cut = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=1), of)
            return cut.dequantize(self.spec, dtype)

        return groups(self.keys), groups(self.values)

    def append(self, k: Array, v: Array, written: Array, valid: Array) -> "QuantizedKVCache":
        """The cache with the next S tokens.

        Args:
          k, v: `[B, S, H, C]`; keys after rotation.
          written: tokens written before; `written + S` may not exceed `capacity`.
          valid: `[B, capacity]`, by slot: a real token stands there.
        """
        S, W = k.shape[1], self.recent_k.shape[1]
        k, v = (jnp.asarray(x, self.recent_k.dtype) for x in (k, v))
        packed = self._pack_oldest(k, v, written, jnp.asarray(valid))
        kept = min(S, W)
        at = (written + S - kept + jnp.arange(kept)) % W
        return dataclasses.replace(
            packed,
            recent_k=self.recent_k.at[:, at].set(k[:, S - kept :], unique_indices=True),
            recent_v=self.recent_v.at[:, at].set(v[:, S - kept :], unique_indices=True),
        )

    def _pack_oldest(self, k: Array, v: Array, written: Array, valid: Array) -> "QuantizedKVCache":
        """Quantizes the groups that S more tokens push out of the ring: of the ring's tokens, then of the new ones."""
        spec, S = self.spec, k.shape[1]
        G, count = spec.group_size, min(math.ceil(S / spec.group_size), self.groups)
        if count == 0:
            return self
        first = self.quantized(written)
        slots = first + jnp.arange(count * G)

        def tokens(ring: Array, new: Array) -> Array:
            old = ring[:, slots % ring.shape[1]]
            new = new.at[:, slots - written].get(mode="clip")
            x = jnp.where((slots < written)[:, None, None], old, new)
            return x.reshape(x.shape[0], count, G, *x.shape[2:])

        real = valid.at[:, slots].get(mode="fill", fill_value=False).reshape(-1, count, G)
        groups = first // G + jnp.arange(count)
        groups = jnp.where(groups * G < self.quantized(written + S), groups, self.groups)  # the others are dropped
        write = lambda old, new: old.at[:, groups].set(new, mode="drop")  # noqa: E731
        keys = quantize_keys(tokens(self.recent_k, k), real, spec)
        values = quantize_values(tokens(self.recent_v, v), spec)
        return dataclasses.replace(
            self, keys=jax.tree.map(write, self.keys, keys), values=jax.tree.map(write, self.values, values)
        )


jax.tree_util.register_dataclass(
    QuantizedKVCache, data_fields=["keys", "values", "recent_k", "recent_v"], meta_fields=["spec", "capacity"]
)


def _round(x: Array, real: Array, axis: int, bits: int) -> tuple[Array, Array, Array]:
    """Codes of `x` in float32, and scale and zero of its groups along `axis`, which span what is `real` in them."""
    levels = (1 << bits) - 1
    some = real.any(axis, keepdims=True)
    low = jnp.where(some, jnp.min(x, axis, where=real, initial=jnp.inf, keepdims=True), 0)
    high = jnp.where(some, jnp.max(x, axis, where=real, initial=-jnp.inf, keepdims=True), 0)
    zero = _bfloat16_below(low)
    step = jnp.maximum((high - zero) / levels, jnp.finfo(jnp.bfloat16).tiny)  # a constant group has range 0
    scale = -_bfloat16_below(-step)
    codes = jnp.clip(jnp.round((x - zero) / scale), 0, levels).astype(jnp.uint32)
    broken = jnp.any(jnp.isnan(x) & real, axis, keepdims=True)  # a compiled minimum may pass over what is no number
    return codes, jnp.where(broken, jnp.nan, scale).astype(jnp.bfloat16), zero.astype(jnp.bfloat16)


def _bfloat16_below(x: Array) -> Array:
    """The largest bfloat16 that is no larger than `x`, as float32.

    By its bits: a conversion there and back is one the compiler may leave out.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    away_from_zero = jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFF), jnp.uint32(0))
    return jax.lax.bitcast_convert_type((bits + away_from_zero) & jnp.uint32(0xFFFF0000), jnp.float32)


def _pack(codes: Array, bits: int) -> tuple[Array, ...]:
    B, N, G, H, C = codes.shape
    return tuple(plane.reshape(B, N, -1, H, C) for plane in pack(codes.reshape(B, N, G, H * C), bits))
