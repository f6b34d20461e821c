"""The loop that carries hidden states through a model block by block, holding one block's weights at a time.

Hidden states of all windows live on the host between blocks, one batch after another goes through the device. Memory is
one block plus the hidden states, whatever the depth. What is wanted of a block is computed inside the jitted step and
comes out reduced: activations never leave the device but as the next block's input.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.decoder import apply_block, embed
from lq.models.source import ParameterSource
from lq.numerics.sharded import rows_apart, to_host

Measure = Callable[[jax.Array, jax.Array], object]  # (block input, block output) [B, S, D] -> pytree of reductions


FLOAT32 = jnp.dtype(jnp.float32)


def batches(tokens: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Rows in runs of `batch_size`; the last may be shorter. Raises UserError for a batch size below 1."""
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size}; write 1 or more windows per device step")
    return [tokens[i : i + batch_size] for i in range(0, len(tokens), batch_size)]


def check_context(config: ModelConfig, length: int, what: str = "window") -> None:
    """Raises UserError for windows of `length` tokens that are longer than the model's context.

    Rotary and sliding-window models would compute on beyond it, at positions they were never trained for; the numbers
    that come out look like the model's and are not.
    """
    if length > config.max_positions:
        raise UserError(
            f"{what} of {length} tokens: the model's context is {config.max_positions}; write a smaller window"
        )


def window_for(config: ModelConfig, length: int | None) -> int:
    """The length itself, 512 when None, or the whole context of a model that has less. Raises as `check_context`."""
    if length is None:
        return min(512, config.max_positions)
    check_context(config, length)
    return length


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def embed_batch(config: ModelConfig, embed_params, tokens, dtype=FLOAT32) -> Float[Array, "B S D"]:
    """The first hidden state of one batch, on the device."""
    return embed(config, {"embed": embed_params}, tokens, context_for(tokens), dtype)


@functools.partial(jax.jit, static_argnames=("config", "kind", "measure"))
def _step(config: ModelConfig, kind: BlockKind, block_params, tokens, h, measure: Measure | None):
    out = apply_block(config, kind, block_params, h, context_for(tokens))
    return out, None if measure is None else measure(h, out)


def embed_batches(source: ParameterSource, tokens: np.ndarray, batch_size: int, dtype=jnp.float32) -> list[np.ndarray]:
    """The first hidden state of every batch, on the host.

    Raises UserError for tokens the model has no embedding for, and for windows longer than its context.
    """
    config = source.config
    if int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"token {int(tokens.max())}: the model's vocabulary ends at {config.vocab_size - 1}; "
            "the tokenizer is of another model"
        )
    check_context(config, tokens.shape[1])
    params = source.embed()
    rows = map(rows_apart, batches(tokens, batch_size))
    return [to_host(embed_batch(source.config, params, batch, jnp.dtype(dtype))) for batch in rows]


def through_block(
    config: ModelConfig, kind: BlockKind, block_params, rows: list[np.ndarray], hidden: list[np.ndarray]
) -> list[np.ndarray]:
    """The hidden states after a block, on the host, one batch after another; `hidden` is left alone."""
    pairs = zip(rows, hidden, strict=True)
    return [to_host(_step(config, kind, block_params, *map(rows_apart, pair), None)[0]) for pair in pairs]


def stream(
    source: ParameterSource,
    tokens: np.ndarray,
    *,
    batch_size: int = 8,
    dtype=jnp.float32,
    measure: Measure | None = None,
) -> Iterator[tuple[int, list, list[np.ndarray]]]:
    """Yields `(block index, one measurement per batch, hidden states after the block)` for every block in order.

    Args:
      source: where the weights come from, a block at a time.
      tokens: int32 `[windows, length]`, without padding.
      batch_size: windows per device step.
      dtype: of the hidden states and of the computation.
      measure: reduces a block's input and output inside jit; a stable function, since it is a static argument.

    The yielded list is reused: take what you need before asking for the next block.
    """
    config = source.config
    hidden = embed_batches(source, tokens, batch_size, dtype)
    rows = batches(tokens, batch_size)
    for index, kind in enumerate(config.kinds):
        params = source.block(index)
        measured = []
        for i, batch in enumerate(rows):
            out, value = _step(config, kind, params, rows_apart(batch), rows_apart(hidden[i]), measure)
            hidden[i] = to_host(out)
            measured.append(jax.tree.map(to_host, value))
        yield index, measured, hidden
