"""Skip effect: what the model's output loses when a block passes its input on unchanged.

Two measures of the change from the output distribution p to p':

    kl   mean over tokens of KL(p || p'), nats                 our default, the measure of everything else here
    l2   max over tokens of |p - p'|_2                         as published, over all windows

and two places where the block is skipped:

    everywhere   in every position
    past         in the first half of every window but for position 0, and the change is that of the second half: what
                 later tokens take from what the block computed for earlier ones. Published with four cuts at random
                 places, and with the first position, on which attention sinks stand, left alone

Larger is more important as it stands. Beside the scores stands their depth, sum_l l e_l / sum_l e_l over the blocks
0 to L-1: where along the model its effects lie.

A block is skipped from its own input on, so that the measurements of all L blocks take L / 2 forward passes.

Source: Csordas et al., Do Language Models Use Their Depth Efficiently?, arXiv 2505.13898, and the code beside it.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.replay import Replay, States
from lq.importance.similarity import StreamOptions
from lq.models.config import ModelConfig
from lq.models.decoder import head
from lq.models.source import ParameterSource, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipOptions(StreamOptions):
    measure: Literal["kl", "l2"] = "kl"
    skipped: Literal["everywhere", "past"] = "everywhere"


def skip_effect(source: ParameterSource, windows: Windows, options: SkipOptions) -> dict:
    """What the output distribution loses when a block is left out."""
    length = windows.tokens.shape[1]
    if options.skipped == "past" and length < 4:
        raise UserError(f"skipped: past, but windows of {length} tokens have none to skip; write everywhere")
    run, values = Replay(source, windows, options.batch_size), {}
    cut = length // 2 if options.skipped == "past" else 0
    for index, _, before, after in run.blocks():
        final = run.to_end(index + 1, without_block(before, after, cut))
        values[f"block_{index}"] = run.kl(final, cut) if options.measure == "kl" else _furthest(run, final, cut)
    total = sum(values.values())
    depth = sum(i * effect for i, effect in enumerate(values.values())) / total if total > 0 else 0.0
    return {"values": values, "passes": run.passes, "extra": {"depth": depth}}


def without_block(before: States, after: States, cut: int) -> States:
    """`after` with positions 1 to `cut - 1` as they were `before`; with every position so for a `cut` of 0."""
    if cut == 0:
        return before
    mixed = [a.copy() for a in after]
    for new, b in zip(mixed, before, strict=True):
        new[:, 1:cut] = b[:, 1:cut]
    return mixed


def _furthest(run: Replay, final: States, first: int) -> float:
    pairs = zip(run.reference, final, strict=True)
    return float(max(np.max(furthest(run.config, run.head_params, h, other, first)) for h, other in pairs))


@functools.partial(jax.jit, static_argnames=("config", "first"))
def furthest(
    config: ModelConfig, head_params: Params, h: Float[Array, "B S D"], other: Float[Array, "B S D"], first: int
) -> Float[Array, " B"]:
    """max |softmax(head h) - softmax(head other)|_2 over the positions from `first` on, of every window; float32."""

    def one_window(pair):
        p, q = (jax.nn.softmax(head(config, head_params, x[None, first:])[0]) for x in pair)
        return jnp.linalg.norm(p - q, axis=-1).max()

    return jax.lax.map(one_window, (h, other))
