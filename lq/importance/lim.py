"""LIM, Layer Input Modification: how much a block changes its input (Dumitru et al., arXiv 2406.17415).

    LIM_l = - cos(h_l, h_{l+1})

with h_l the residual stream entering block l and h_{l+1} the one leaving it, before any final norm. Larger (less alike)
is more important, so the score is canonical as it stands. The paper's text leaves the aggregation open; both found in
the literature are here: the cosine per token, averaged over tokens (`token`, the default, equal to ShortGPT's Block
Influence minus one), and one cosine per window over all its tokens flattened (`flat`), which a single token of large
norm can decide.

The first position of a window often carries a norm hundreds of times the others' (an attention sink), so the mean
without it is measured as well, in `extra["without_position_0"]`.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.calibration.stream import stream
from lq.errors import UserError
from lq.models.source import ParameterSource

TINY = 1e-30  # added to a product of norms: a zero vector has cosine 0 with everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class LIMOptions:
    aggregation: Literal["token", "flat"] = "token"
    skip_position_0: bool = False  # leave the first position of every window out of the score itself
    batch_size: int = 8  # windows per device step

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size}; write 1 or more")


def cosines(h: Float[Array, "B S D"], out: Float[Array, "B S D"]) -> dict[str, Float[Array, " B"]]:
    """Per window, in float32: the mean token cosine and the flattened cosine, with and without position 0."""
    h, out = h.astype(jnp.float32), out.astype(jnp.float32)
    dot, hh, oo = (h * out).sum(-1), (h * h).sum(-1), (out * out).sum(-1)  # [B, S]
    token = dot / (jnp.sqrt(hh) * jnp.sqrt(oo) + TINY)

    def flat(first):
        a, b, c = (v[:, first:].sum(1) for v in (dot, hh, oo))
        return a / (jnp.sqrt(b) * jnp.sqrt(c) + TINY)

    return {"token": token.mean(1), "token_1": token[:, 1:].mean(1), "flat": flat(0), "flat_1": flat(1)}


def lim(source: ParameterSource, windows: Windows, options: LIMOptions) -> dict:
    """How much a block changes its input: minus the cosine of input and output.

    Returns scores per block, and under `extra` the same aggregation with position 0 left out (or kept, when the score
    skips it).
    """
    suffix, other = ("_1", "") if options.skip_position_0 else ("", "_1")
    values, extra = {}, {}
    for index, measured, _ in stream(source, windows.tokens, batch_size=options.batch_size, measure=cosines):
        mean = {key: float(np.concatenate([m[key] for m in measured]).mean(dtype=np.float64)) for key in measured[0]}
        values[f"block_{index}"] = -mean[options.aggregation + suffix]
        extra[f"block_{index}"] = -mean[options.aggregation + other]
    name = "with_position_0" if options.skip_position_0 else "without_position_0"
    return {"values": values, "extra": {name: extra}}
