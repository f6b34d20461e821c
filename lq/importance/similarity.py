"""Scores from how alike the residual stream is before and after a block: forward passes alone, no weights.

With h the stream before a block, u behind its attention and o behind its feed-forward network, per token:

    block_influence   1 - cos(h, o)            ShortGPT (Men et al., arXiv 2403.03853); LIM plus 1
      of parts        1 - cos(h, u), 1 - cos(u, o)   What Matters in Transformers? (He et al., arXiv 2406.15786)
    angular           arccos cos(h, o) / pi    of each window's last token alone: The Unreasonable Ineffectiveness of
                                               the Deeper Layers (Gromov et al., arXiv 2403.17887)
    contribution      |o - h| / |h|            Do Language Models Use Their Depth Efficiently? (Csordas et al., arXiv
                                               2505.13898)

averaged over tokens. Larger is a larger change, which is canonical as it stands. All in float32: in bfloat16 the
cosines of late blocks, 0.98 and more, are five numbers or so.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lq.calibration.calls import calls_in_block
from lq.calibration.data import Windows
from lq.calibration.stream import batches, embed_batches
from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.source import ParameterSource, Params
from lq.numerics.sharded import rows_apart, to_host

TINY = 1e-30  # added to a product of norms: a zero vector has cosine 0 with everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions:
    batch_size: int = 8  # windows per device step

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size}; write 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceOptions(StreamOptions):
    unit: Literal["block", "part"] = "block"


def block_influence(source: ParameterSource, windows: Windows, options: InfluenceOptions) -> dict:
    """How far a block, or each of its two parts, turns the residual stream: 1 minus the mean token cosine."""
    values = {}
    for index, kind, found in _changes(source, windows, options.batch_size):
        if options.unit == "block":
            values[f"block_{index}"] = 1.0 - float(found["block"].mean())
        else:
            values[f"block_{index}/attention"] = 1.0 - float(found["attention"].mean())
            values[f"block_{index}/{'moe' if kind.routed else 'mlp'}"] = 1.0 - float(found["mlp"].mean())
    return {"values": values}


def angular(source: ParameterSource, windows: Windows, options: StreamOptions) -> dict:
    """The angle by which a block turns the last token of every window, over pi."""
    found = _changes(source, windows, options.batch_size)
    angles = {index: np.arccos(np.clip(one["last"], -1.0, 1.0)) / np.pi for index, _, one in found}
    return {"values": {f"block_{index}": float(angle.mean()) for index, angle in angles.items()}}


def contribution(source: ParameterSource, windows: Windows, options: StreamOptions) -> dict:
    """How long what a block adds is, over what is there: the mean of |output - input| / |input|."""
    found = _changes(source, windows, options.batch_size)
    return {"values": {f"block_{index}": float(one["added"].mean()) for index, _, one in found}}


def _changes(source: ParameterSource, windows: Windows, batch_size: int) -> Iterator[tuple[int, BlockKind, dict]]:
    """Index, kind and `changes` over all windows, float64 `[windows]`, of every block in order."""
    rows = batches(windows.tokens, batch_size)
    hidden = embed_batches(source, windows.tokens, batch_size)
    for index, kind in enumerate(source.config.kinds):
        params, measured = source.block(index, jnp.float32), []
        for i, tokens in enumerate(rows):
            out, found = changes(source.config, kind, params, rows_apart(hidden[i]), rows_apart(tokens))
            hidden[i] = to_host(out)
            measured.append(jax.tree.map(to_host, found))
        yield index, kind, {key: np.concatenate([m[key] for m in measured]).astype(np.float64) for key in measured[0]}


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def changes(
    config: ModelConfig, kind: BlockKind, params: Params, h: Float[Array, "B S D"], tokens: Int[Array, "B S"]
) -> tuple[Float[Array, "B S D"], dict[str, Float[Array, " B"]]]:
    """A block's output, and per window what it changed.

    Mean token cosines of the whole `block`, its `attention` and its `mlp`; the cosine of the `last` token; and the mean
    share that is `added`. float32.
    """
    whole, middle = "", "mlp_norm"  # the block itself, and what reads the stream behind the attention
    calls = calls_in_block(config, kind, params, h, context_for(tokens), {whole: "__call__", middle: "__call__"})
    u, (out, _) = calls[middle].args[0], calls[whole].result
    of_tokens = cosine(h, out)
    added = jnp.linalg.norm(out - h, axis=-1) / (jnp.linalg.norm(h, axis=-1) + TINY)
    return out, {
        "block": of_tokens.mean(1),
        "attention": cosine(h, u).mean(1),
        "mlp": cosine(u, out).mean(1),
        "last": of_tokens[:, -1],
        "added": added.mean(1),
    }


def cosine(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Of the angle between vectors, in float32; 0 where one is zero."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return (a * b).sum(-1) / (jnp.sqrt((a * a).sum(-1)) * jnp.sqrt((b * b).sum(-1)) + TINY)
