"""What a model loses on one window, from its last hidden states; differentiable by them.

    nll       sum over the scored positions of  -ln q(the token that comes next)
    sampled   the same of a token drawn from q: its gradients are those of the true Fisher information
    kl        sum over the scored positions of  sum_v p(v) (ln p(v) - ln q(v)),    p the original

q is the model. A mean over text divides by the scored positions of all windows. What is drawn depends on the window
and a seed alone, not on where the window stands among others.
"""

import zlib
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lq.calibration.data import Windows
from lq.calibration.stream import batches
from lq.errors import UserError
from lq.evaluation.evaluate import scored_targets
from lq.models.config import ModelConfig
from lq.models.decoder import head

Loss = Literal["nll", "sampled", "kl"]


@flax.struct.dataclass
class Text:
    """Windows with what a loss needs to know of them; with a batch axis, or one alone without it."""

    tokens: Int[Array, "B S"]
    scored: Bool[Array, "B S-1"]
    draw: UInt32[Array, " B"]  # what the labels of a window are drawn by, besides the seed
    # The original's last hidden states; for kl.
    original: Float[Array, "B S D"] | Float[np.ndarray, "B S D"] | None = None


def text_of(windows: Windows, batch_size: int) -> list[Text]:
    """The windows in batches. Raises UserError when none of their tokens is scored."""
    scored = scored_targets(windows)
    if not scored.any():
        raise UserError("windows of 1 token: a loss needs a token before it; give windows of 2 or more")
    draws = np.array([zlib.crc32(np.ascontiguousarray(row, np.int32)) for row in windows.tokens], np.uint32)
    columns = (batches(column, batch_size) for column in (windows.tokens, scored, draws))
    return [Text(*row) for row in zip(*columns, strict=True)]


def window_loss(config: ModelConfig, loss: Loss, head_params, seed, text: Text, h: Float[Array, "S D"]):
    """The loss of one window, summed over its scored positions, in nats; at least float32.

    `head_params` are what `decoder.head` reads, of the model and of the original alike.
    """
    log_q = jax.nn.log_softmax(head(config, head_params, h[None, :-1])[0])
    if loss == "kl":
        if text.original is None:
            raise ValueError("kl needs the original's last hidden states")
        log_p = jax.nn.log_softmax(head(config, head_params, jnp.asarray(text.original)[None, :-1])[0])
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), where=text.scored[:, None])
    labels = text.tokens[1:]
    if loss == "sampled":
        labels = jax.random.categorical(jax.random.fold_in(jax.random.key(seed), text.draw), log_q)
    return -jnp.sum(jnp.take_along_axis(log_q, labels[:, None], axis=-1)[:, 0], where=text.scored)
