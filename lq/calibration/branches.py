"""The two branches of a block: what attention and the feed-forward network write to the residual stream.

Something may be added to what they write, which is how a loss is differentiated by it.
"""

from collections.abc import Mapping

import flax.linen as nn
from jaxtyping import Array, Float

from lq.models.config import BlockKind, ModelConfig
from lq.models.context import Context
from lq.models.decoder import apply_block


def branch_writers(config: ModelConfig, kind: BlockKind) -> dict[str, str]:
    """The module that writes each branch, by the name of the part: itself, or the norm behind it."""
    feed_forward = "moe" if kind.routed else "mlp"
    if config.post_norms:
        return {"attention": "attention_post_norm", feed_forward: "mlp_post_norm"}
    return {"attention": "attention", feed_forward: feed_forward}


def run_branches(
    config: ModelConfig,
    kind: BlockKind,
    block_params,
    h: Float[Array, "B S D"],
    context: Context,
    added: Mapping[str, Float[Array, "B S D"]],
) -> tuple[Float[Array, "B S D"], dict[str, Float[Array, "B S D"]]]:
    """A block's output with `added` on top of what each part writes; and what each part writes, without it."""
    parts = {module: part for part, module in branch_writers(config, kind).items()}
    written: dict[str, Array] = {}

    def write(method, args, kwargs, call):
        result = method(*args, **kwargs)
        part = parts.get("/".join(call.module.path))
        if part is None or call.method_name != "__call__":
            return result
        written[part], *cache = result if isinstance(result, tuple) else (result,)
        total = written[part] + added[part]
        return (total, *cache) if cache else total

    with nn.intercept_methods(write):
        out = apply_block(config, kind, block_params, h, context)
    return out, written
