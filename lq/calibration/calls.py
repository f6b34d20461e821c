"""Calls inside a block: what its modules are given and give, seen from a plain forward pass.

Use inside jit and reduce what comes out: what no reduction reads is never computed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.models.config import BlockKind, ModelConfig
from lq.models.context import Context
from lq.models.decoder import apply_block


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a method of a module."""

    args: tuple
    result: Any


def calls_in_block(
    config: ModelConfig,
    kind: BlockKind,
    block_params,
    h: Float[Array, "B S D"],
    context: Context,
    methods: Mapping[str, str],
) -> dict[str, Call]:
    """The call of each method in one run of the block, by the path of its module: `{"attention/o_proj": "__call__"}`.

    Raises KeyError for a method that the block does not call.
    """
    seen: dict[str, Call] = {}

    def record(method, args, kwargs, call):
        result = method(*args, **kwargs)
        path = "/".join(call.module.path)
        if methods.get(path) == call.method_name:
            seen[path] = Call(args, result)
        return result

    with nn.intercept_methods(record):
        apply_block(config, kind, block_params, h, context)
    return {path: seen[path] for path in methods}


def expert_of_rows(rows_per_expert: Int[Array, " experts"], rows: int) -> Int[Array, " rows"]:
    """Which expert each row belongs to, of `rows` rows sorted by expert (the input of a `StackedLinear`)."""
    return jnp.repeat(jnp.arange(rows_per_expert.shape[0]), rows_per_expert, total_repeat_length=rows)
