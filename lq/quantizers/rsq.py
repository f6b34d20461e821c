"""Token importance: how much each calibration token counts in a second moment (RSQ, arXiv 2503.01820).

    attncon    r_j = sum over heads h and queries i of P[h, i, j], P the causal softmax of the block's attention on its
               own input: how much token j is attended to
    actnorm    r_j = |x_j|, x_j the block's input at token j
    firstn     the first tokens of a sequence count, the others do not
    uniform    all count alike

The first two are stretched to [r_min, 1] within each sequence, r <- r_min + (1 - r_min) (r - min) / (max - min), and 1
everywhere where all are equal. All are then scaled to mean one within each sequence, so that a second moment
sum_j r_j x_j x_j^T weighs what it does without them. A block's r serves all of its matrices.

Early tokens are seen by more queries and an attention sink takes most of the mass; the reference code keeps both.

Not here: its dataset expansion, by which every sequence is used eight times over, rolled on by an eighth of its length
each time, so that tokens stand at several positions; and importance by the change of a token in the block, by rarity
and by likeness to others. Its GPTQ has symmetric codes, one searched range an output channel and no act-order, which
are options here and not the defaults.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.calibration.calls import calls_in_block
from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import Context, context_for
from lq.models.layers import attention_scores, stack_queries
from lq.numerics.spec import QuantSpec
from lq.quantizers.gptq import GPTQFactor, GPTQOptions, gptq
from lq.registry import refuse_idle

SLICE = 128  # queries whose attention is there at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """Which importance. Raises UserError for numbers out of range."""

    importance: Literal["attncon", "actnorm", "firstn", "uniform"] = "attncon"
    r_min: float = 0.01  # of the least important token, the most important having 1; more without rotation
    first: int | None = None  # firstn: how many tokens; an eighth of the sequence when None

    def __post_init__(self):
        if not 0 <= self.r_min <= 1:
            raise UserError(f"rsq: option r_min: {self.r_min}; write a number from 0 to 1")
        if self.first is not None and self.first < 1:
            raise UserError(f"rsq: option first: {self.first}; write 1 or more tokens, or null")
        if self.importance != "firstn":
            refuse_idle(self, "rsq", ("first",), f"importance is {self.importance}, not firstn")
        if self.importance in ("firstn", "uniform"):
            refuse_idle(self, "rsq", ("r_min",), f"importance {self.importance} is not stretched to it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RSQOptions(GPTQOptions, ImportanceOptions):
    """GPTQ's options, and which importance."""

    method: ClassVar[str] = "rsq"

    def __post_init__(self):
        GPTQOptions.__post_init__(self)
        ImportanceOptions.__post_init__(self)


def rsq(weight: Float[Array, "... K N"], stats: InputStats | GPTQFactor, spec: QuantSpec, options: RSQOptions):
    """GPTQ in a second moment where tokens count by their importance, such as the attention that they receive.

    As `gptq`; the statistics are those of tokens weighted by `token_importance`. The paper rotates the model before
    (the transform `hadamard`).
    """
    return gptq(weight, stats, spec, options)


@functools.partial(jax.jit, static_argnames=("config", "kind", "options"))
def token_importance(
    config: ModelConfig,
    kind: BlockKind,
    block_params,
    h: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    options: ImportanceOptions,
) -> Float[Array, "B S"]:
    """How much each token of a batch counts, float32, mean one in every sequence.

    Args:
      config, kind, block_params: the block before it is quantized.
      h: its input.
      tokens: the tokens of the batch, without padding.
      options: static.
    """
    B, S = tokens.shape
    if options.importance == "attncon":
        return attention_concentration(config, kind, block_params, h, context_for(tokens), options.r_min)
    if options.importance == "actnorm":
        return mean_one(stretched(jnp.linalg.norm(h.astype(jnp.float32), axis=-1), options.r_min))
    if options.importance == "firstn":
        first = min(options.first or -(-S // 8), S)
        return mean_one(jnp.broadcast_to((jnp.arange(S) < first).astype(jnp.float32), (B, S)))
    return jnp.ones((B, S), jnp.float32)


def attention_concentration(
    config: ModelConfig, kind: BlockKind, block_params, h: Float[Array, "B S D"], context: Context, r_min: float
) -> Float[Array, "B S"]:
    """Importance by attention, stretched to [r_min, 1] and scaled to mean one; see the module's docstring."""
    return mean_one(stretched(attention_received(config, kind, block_params, h, context), r_min))


def attention_received(
    config: ModelConfig, kind: BlockKind, block_params, h: Float[Array, "B S D"], context: Context
) -> Float[Array, "B S"]:
    """Attention that each token gets from all queries of all heads: column sums of P, `num_heads * S` in a sequence.

    Whatever stands between a block's input and its softmax is the model's own: norms, rotary positions, windows, soft
    caps. Computed in slices of queries, `[B, heads, SLICE, S]` at a time, in float32 or the wider dtype of `h`.
    """
    heads = calls_in_block(config, kind, block_params, h, context, {"attention": "heads"})["attention"].result
    q, k = heads[:2]
    S = h.shape[1]
    size = min(SLICE, S)

    def add(i, received):
        start = jnp.minimum(i * size, S - size)  # the last slice overlaps the one before it
        queries = start + jnp.arange(size)
        part = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1)
        mask = dataclasses.replace(context, positions=context.positions[:, queries]).mask(kind.window)
        stacked = stack_queries(part, k.shape[2])
        scores = attention_scores(stacked, k, mask, config.query_scale, config.attention_softcap)
        weights = jax.nn.softmax(scores, axis=-1).reshape(*scores.shape[:2], -1, size, S)
        new = (queries >= i * size)[:, None]
        return received + jnp.sum(weights, axis=(1, 2, 3), where=new)

    dtype = jnp.promote_types(h.dtype, jnp.float32)
    return jax.lax.fori_loop(0, -(-S // size), add, jnp.zeros(h.shape[:2], dtype))


def stretched(r: Float[Array, "B S"], r_min: float) -> Float[Array, "B S"]:
    """r from its least to its greatest value in each sequence, mapped to [r_min, 1]; 1 where they are equal."""
    low, high = r.min(axis=1, keepdims=True), r.max(axis=1, keepdims=True)
    span = jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, jnp.clip(r_min + (1.0 - r_min) * (r - low) / span, r_min, 1.0), 1.0)


def mean_one(r: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """r over its mean in each sequence."""
    return r / r.mean(axis=1, keepdims=True)
