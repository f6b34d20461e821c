"""Statistics of the tensors that channel lines rescale, over a calibration set held on the host."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.calls import calls_in_block, expert_of_rows
from lq.calibration.statistics import InputStats, reduce_inputs
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.quantizers.channel_lines import Line, channel_lines


def line_statistics(
    config: ModelConfig,
    kind: BlockKind,
    block_params,
    hidden: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    needs: frozenset[str],
) -> dict[Line, InputStats]:
    """What the readers of every line of the block read, summed over the batches.

    Args:
      config, kind, block_params: the block, dense.
      hidden: its inputs `[B, S, D]`, one a batch, at least one.
      tokens: `[B, S]` of each batch.
      needs: fields of `InputStats` to fill.

    Returns:
      Per line statistics of its tensor, in the readers' channels; of a line with experts, `[experts, ...]`.
    """
    total = None
    for h, batch in zip(hidden, tokens, strict=True):
        reduced = _reduced(config, kind, block_params, batch, h, needs)
        total = reduced if total is None else [a + b for a, b in zip(total, reduced, strict=True)]
        jax.block_until_ready(total)  # one batch of states on the device
    return dict(zip(channel_lines(config, kind), total or [], strict=True))


@functools.partial(jax.jit, static_argnames=("config", "kind", "needs"))
def _reduced(config: ModelConfig, kind: BlockKind, block_params, tokens, h, needs: frozenset[str]) -> list[InputStats]:
    lines = channel_lines(config, kind)
    methods = {line.inspected: "__call__" for line in lines}
    calls = calls_in_block(config, kind, block_params, h, context_for(tokens), methods)
    return [_reduce(line, calls[line.inspected].args, needs) for line in lines]


def _reduce(line: Line, args: tuple, needs: frozenset[str]) -> InputStats:
    x = args[0].reshape(-1, args[0].shape[-1])
    if line.experts is None:
        return reduce_inputs(x, needs)
    expert = expert_of_rows(args[1], x.shape[0])
    one = lambda e: reduce_inputs(x, needs, (expert == e).astype(jnp.float32))  # noqa: E731
    return jax.lax.map(one, jnp.arange(line.experts))
