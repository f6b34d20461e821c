"""The decoder: embed, a row of unrolled blocks, head. One definition for every family.

    model = Decoder(config)
    logits = model.apply({"params": params}, tokens)

`params` is a nested dict: `embed` (tokens, and positions where they are learned), `block_0` to `block_{L-1}`, and
`head` (the final norm, and a kernel unless the embeddings are tied). Any linear `kernel` and the token embedding may be
a packed `QTensor`; the definition does not know.

The three parts are usable alone, each on its own slice of `params`, which is how calibration streams a model that does
not fit in memory:

    h = embed(config, params, tokens, context)
    for i, kind in enumerate(config.kinds):
        h = apply_block(config, kind, params[f"block_{i}"], h, context)
    logits = head(config, params, h)

The compute dtype is the dtype of the embedding's output; pass `dtype` to fix it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lq.models.config import BlockKind, ModelConfig
from lq.models.context import Cache, Context, DecodeState, context_for, with_heads_apart
from lq.models.layers import (
    KERNEL_AXES,
    MLP,
    Attention,
    MixtureOfExperts,
    Norm,
    at_least_float32,
    read_or_init,
    rotate_online,
    unboxed,
)
from lq.numerics.matmul import lookup, matmul
from lq.numerics.segmented import is_packed
from lq.numerics.sharded import with_rows_apart


class Table(nn.Module):
    """An embedding table `[rows, channels]`; the token table may be a `QTensor` of logical shape `[channels, rows]`."""

    rows: int
    channels: int
    axis: str  # the logical name of the rows

    @nn.compact
    def __call__(self, indices: Int[Array, "B S"] | None = None) -> Any:
        """The rows at `indices`, or the whole table as a head's `[channels, rows]` kernel when `indices` is None."""
        init = nn.initializers.normal(0.02)
        axes = (self.axis, "embed")
        table = read_or_init(self, "embedding", init, (self.rows, self.channels), axes)
        if indices is None:
            return table if is_packed(table) else table.T
        return lookup(table, indices, axes)


class Embed(nn.Module):
    """Token embedding, scaled, plus learned positions where the family has them; centered and rotated where asked."""

    config: ModelConfig
    dtype: DTypeLike | None = None

    def setup(self):
        config = self.config
        self.tokens = Table(config.vocab_size, config.hidden_size, "vocab")
        if config.learned_position_offset is not None:
            rows = config.max_positions + config.learned_position_offset
            self.positions = Table(rows, config.hidden_size, "positions")

    def __call__(self, tokens: Int[Array, "B S"], context: Context) -> Float[Array, "B S D"]:
        config = self.config
        h = jnp.asarray(self.tokens(tokens), self.dtype)
        if config.embedding_scale != 1.0:
            h *= jnp.asarray(config.embedding_scale, h.dtype)  # rounded to the compute dtype, as Gemma was trained
        if config.learned_position_offset is not None:
            h += self.positions(context.positions + config.learned_position_offset).astype(h.dtype)
        if config.center_embeddings:
            wide = h.astype(at_least_float32(h.dtype))
            h = (wide - wide.mean(-1, keepdims=True)).astype(h.dtype)
        return rotate_online(config, "residual", h)

    def as_head(self):
        return self.tokens()


class Block(nn.Module):
    """x + attention(norm x), then + feed-forward(norm x); Gemma 2/3 also norm what is added."""

    config: ModelConfig
    kind: BlockKind

    @nn.compact
    def __call__(
        self, h: Float[Array, "B S D"], context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        config, h = self.config, with_rows_apart(h)
        y = Norm(config, name="attention_norm")(h)
        y, cache = Attention(config, self.kind, name="attention")(y, context, cache)
        if config.post_norms:
            y = Norm(config, name="attention_post_norm")(y)
        h += y
        y = Norm(config, name="mlp_norm")(h)
        y = MixtureOfExperts(config, name="moe")(y) if self.kind.routed else MLP(config, name="mlp")(y)
        if config.post_norms:
            y = Norm(config, name="mlp_post_norm")(y)
        return h + y, cache


class Head(nn.Module):
    """Final norm, projection to the vocabulary, soft cap. Logits are float32, of a computation in float64 float64."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: Float[Array, "B S D"], tied_kernel=None, project: bool = True) -> Float[Array, "B S V"]:
        """What the projection is applied to, `[B, S, D]`, unless `project`."""
        config = self.config
        h = rotate_online(config, "residual", h, inverse=True)
        h = Norm(config, config.final_norm, name="final_norm")(h)
        if not project:
            return h
        axes = KERNEL_AXES["head"]
        if tied_kernel is None:
            init = nn.initializers.normal(0.02)
            tied_kernel = read_or_init(self, "kernel", init, (config.hidden_size, config.vocab_size), axes)
        logits = matmul(h, tied_kernel, axes)
        logits = logits.astype(at_least_float32(logits.dtype))
        if config.logit_softcap is not None:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits


class Decoder(nn.Module):
    """The whole model. `dtype` is the compute dtype; the embedding's own when None."""

    config: ModelConfig
    dtype: DTypeLike | None = None

    def setup(self):
        self.embed = Embed(self.config, self.dtype)
        self.block = [Block(self.config, kind) for kind in self.config.kinds]
        self.head = Head(self.config)

    def __call__(self, tokens: Int[Array, "B S"], valid: Bool[Array, "B S"] | None = None) -> Float[Array, "B S V"]:
        """Logits, as `Head` gives them. `valid` marks real tokens, all when None; logits at the others mean nothing."""
        context = context_for(tokens, valid)
        h = self.embed(tokens, context)
        for block in self.block:
            h, _ = block(h, context)
        return self._logits(h)

    def step(
        self,
        tokens: Int[Array, "B S"],
        state: DecodeState,
        valid: Bool[Array, "B S"] | None = None,
        logits_to_keep: int | None = None,
    ) -> tuple[Float[Array, "B keep V"], DecodeState]:
        """Feeds the next S tokens through the cache: prefill with S > 1, decoding with S = 1.

        Returns the logits of the last `logits_to_keep` positions (all when None) and the state after them. A long
        prompt's logits are larger than its cache; generation needs the last only.
        """
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid.astype(bool)
        state, context = state.extend(valid)
        h = self.embed(tokens, context)
        caches: list[Any] = []
        for block, cache in zip(self.block, state.caches, strict=True):
            h, cache = block(h, context, cache)
            caches.append(with_heads_apart(cache))
        if logits_to_keep is not None:
            h = h[:, -logits_to_keep:]
        return self._logits(h), dataclasses.replace(state, caches=tuple(caches))

    def _logits(self, h):
        return self.head(h, self.embed.as_head() if self.config.tie_embeddings else None)


def abstract_params(config: ModelConfig):
    """The parameter tree as `jax.ShapeDtypeStruct`s: which leaves a model has, and their shapes. Allocates nothing."""
    return unboxed(_abstract(config))


def logical_axes(config: ModelConfig):
    """The same tree with the logical names of every leaf's axes, a `PartitionSpec`."""
    return nn.get_partition_spec(_abstract(config))


def _abstract(config: ModelConfig):
    """`ShapeDtypeStruct`s in boxes with the names of their axes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def embed(
    config: ModelConfig, params, tokens: Int[Array, "B S"], context: Context, dtype: DTypeLike | None = None
) -> Float[Array, "B S D"]:
    """The first hidden state. Reads `params["embed"]` only."""
    h: Any = Embed(config, dtype).apply({"params": params["embed"]}, tokens, context)
    return h


def apply_block(
    config: ModelConfig, kind: BlockKind, block_params, h: Float[Array, "B S D"], context: Context
) -> Float[Array, "B S D"]:
    """One block on its own parameters; the output is the next block's input, before any final norm."""
    return Block(config, kind).apply({"params": block_params}, h, context)[0]


def head_input(config: ModelConfig, head_params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """What the head's matrix is applied to: the last hidden state behind the final norm."""
    normed: Any = Head(config).apply({"params": head_params}, h, project=False)
    return normed


def head(config: ModelConfig, params, h: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Logits from the last hidden state. Reads `params["head"]`, and `params["embed"]` when the embeddings are tied."""
    kernel = None
    if config.tie_embeddings:
        kernel = Embed(config).apply({"params": params["embed"]}, method="as_head")
    logits: Any = Head(config).apply({"params": params["head"]}, h, kernel)
    return logits
