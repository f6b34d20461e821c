"""Where tokens stand and what they may see: positions, masks, and the key/value cache.

A call without a cache attends to its own tokens. A call with one writes its keys and values into the next free slots
and attends to every slot written so far. Positions count real tokens only, so padding on the left or on the right does
not shift them; a slot's number and its token's position differ by the padding before it.

The cache is dense (`KVCache`) or quantized (`lq_kernels.kv_cache.QuantizedKVCache`); keys are cached after rotation.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lq.models.config import ModelConfig
from lq.numerics.sharded import Axes, with_rows_apart
from lq_kernels.kv_cache import KVCacheSpec, QuantizedKVCache


@flax.struct.dataclass
class KVCache:
    """Keys and values of one block; slot t holds the t-th token fed, padding included."""

    k: Float[Array, "B T G C"]
    v: Float[Array, "B T G C"]

    def write(self, k: Float[Array, "B S G C"], v: Float[Array, "B S G C"], start: Int[Array, ""]) -> "KVCache":
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return KVCache(write(self.k, k.astype(self.k.dtype)), write(self.v, v.astype(self.v.dtype)))


Cache = KVCache | QuantizedKVCache


def axes_of_cache(leaf: Any) -> Axes:
    """Logical names of all axes but the first, rows, of an array of a cache: axis -2 is heads in every one."""
    return (*(None,) * (leaf.ndim - 3), "kv_heads", None)


def with_heads_apart(cache: Any) -> Any:
    """The cache with its rows and heads dealt out over the mesh in force, if any."""
    return jax.tree.map(lambda leaf: with_rows_apart(leaf, *axes_of_cache(leaf)), cache)


@flax.struct.dataclass
class Context:
    """What every block needs besides its input: the place of each query and of each key."""

    positions: Int[Array, "B S"]
    key_positions: Int[Array, "B T"]
    key_valid: Bool[Array, "B T"]  # a real token stands there
    start: Int[Array, ""]  # the cache slot of the first query
    length: Int[Array, ""]  # tokens of the longest context, padding left out; selects longrope's table

    def mask(self, window: int | None, slots: Int[Array, " T"] | None = None) -> Bool[Array, "B S T"]:
        """True where a query may look: itself and before, inside the window, real tokens only.

        The keys are those at `slots`, all when None; no query sees a slot past the last.
        """
        key_positions, key_valid = self.key_positions, self.key_valid
        if slots is not None:
            key_positions = key_positions.at[:, slots].get(mode="clip")
            key_valid = key_valid.at[:, slots].get(mode="fill", fill_value=False)
        distance = self.positions[:, :, None] - key_positions[:, None, :]
        visible = (distance >= 0) & key_valid[:, None, :]
        return visible & (distance < window) if window is not None else visible


def context_for(tokens: Int[Array, "B S"], valid: Bool[Array, "B S"] | None = None) -> Context:
    """The context of a plain forward pass. `valid` marks real tokens (an attention mask); all are when it is None."""
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid.astype(bool)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    return Context(positions, positions, valid, jnp.int32(0), length=positions.max() + 1)


@flax.struct.dataclass
class DecodeState:
    """All that `generate` carries from token to token."""

    caches: tuple[Cache, ...]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    filled: Int[Array, ""]  # slots written
    length: Int[Array, ""]  # tokens the longest row may reach

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype=jnp.float32,
        length: Int[Array, ""] | None = None,
        quantized: KVCacheSpec | None = None,
    ) -> "DecodeState":
        """Room for `capacity` tokens a row, in `dtype` or `quantized`.

        `length` is how long the longest row will get, `capacity` when None. It is fixed beforehand because longrope has
        one table for short and one for long contexts, and keys in the cache must have been rotated by the one in use.
        """
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def cache() -> Cache:
            if quantized is not None:
                return QuantizedKVCache.empty(quantized, *shape, dtype)
            return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        caches = tuple(cache() for _ in config.kinds)
        slots = (batch, capacity)
        length = jnp.int32(capacity if length is None else length)
        return cls(caches, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, bool), jnp.int32(0), length)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of all blocks' keys and values; of an abstract state too."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.caches))

    def extend(self, valid: Bool[Array, "B S"]) -> tuple["DecodeState", Context]:
        """Makes room for the next `valid.shape[1]` tokens; returns the state with their places and their context."""
        seen = self.valid.sum(1, keepdims=True)
        positions = jnp.maximum(seen + jnp.cumsum(valid, axis=1) - 1, 0)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.filled, axis=1)
        all_positions = write(self.positions, positions.astype(jnp.int32))
        all_valid = write(self.valid, valid.astype(bool))
        state = dataclasses.replace(self, positions=all_positions, valid=all_valid, filled=self.filled + valid.shape[1])
        return state, Context(positions, all_positions, all_valid, self.filled, self.length)
