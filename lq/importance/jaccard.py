"""LSAQ: how far a block changes which tokens the stream would name first.

    A = the k first tokens of head(h_l),   B = those of head(h_{l+1}),   score = 1 - |A and B| / |A or B|

with h_l the stream entering block l, decoded as if it were the last: final norm, unembedding. Of every window's last
token as published, or of `all`. Larger is more change, which is canonical as it stands; 0 where the block changes
nothing, 1 where it leaves no token in place. A public port returns the overlap and so has the order the wrong way
round. k is 50 there; the paper's is not known to us.

The sets are exact, the score is a fraction of whole numbers: blocks of a deep model tie where windows are few.

Source: Zeng et al., LSAQ: Layer-Specific Adaptive Quantization, arXiv 2412.18135.
"""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lq.calibration.data import Windows
from lq.calibration.stream import embed_batches, stream
from lq.errors import UserError
from lq.evaluation.evaluate import head_params_of
from lq.importance.similarity import StreamOptions
from lq.models.config import ModelConfig
from lq.models.decoder import head
from lq.models.source import ParameterSource, Params
from lq.numerics.sharded import to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaccardOptions(StreamOptions):
    k: int = 50  # tokens in a set
    tokens: Literal["last", "all"] = "last"  # of every window

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"k: {self.k}; write 1 or more tokens")


def jaccard(source: ParameterSource, windows: Windows, options: JaccardOptions) -> dict:
    """How many of the first k tokens a block exchanges: 1 minus the Jaccard index of before and after."""
    config = source.config
    if options.k > config.vocab_size:
        raise UserError(f"k: {options.k}, but the vocabulary has {config.vocab_size} tokens; write fewer, such as 50")
    head_params, start = head_params_of(source), -1 if options.tokens == "last" else 0

    def named(hidden: list[np.ndarray]) -> list[Array]:
        return [first_tokens(config, head_params, h[:, start:], options.k) for h in hidden]

    before = named(embed_batches(source, windows.tokens, options.batch_size))
    values = {}
    for index, _, hidden in stream(source, windows.tokens, batch_size=options.batch_size):
        after = named(hidden)
        shared = np.concatenate([to_host(shared_tokens(a, b)) for a, b in zip(before, after, strict=True)])
        values[f"block_{index}"] = 1.0 - float((shared / (2.0 * options.k - shared)).mean())
        before = after
    return {"values": values}


@functools.partial(jax.jit, static_argnames=("config", "k"))
def first_tokens(config: ModelConfig, head_params: Params, h: Float[Array, "B S D"], k: int) -> Int[Array, "B S k"]:
    """The k tokens of the largest logits, decoded from `h`; of equal ones the first. One window after another."""
    return jax.lax.map(lambda window: jax.lax.top_k(head(config, head_params, window[None])[0], k)[1], h)


@jax.jit
def shared_tokens(a: Int[Array, "... k"], b: Int[Array, "... k"]) -> Int[Array, "..."]:
    """How many tokens are in both of two sets without repetitions."""
    return (a[..., :, None] == b[..., None, :]).sum((-2, -1))
