"""Perplexity, KL divergence to the original and top-1 agreement, streamed block by block.

    perplexity = exp( sum of -ln p(token | those before it in its window) / number of scored tokens )

The first token of a window is never scored. With overlapping windows (stride < window) a token is scored once, in the
first window that contains it. Logits, their softmax and all sums over a window are float32; sums over windows are
float64.

    KL    = mean over scored positions of  sum_v p(v) (ln p(v) - ln q(v)),   p the original, q the model judged, in nats
    top-1 = share of scored positions where both put the same token first

The original's hidden states after its last block are kept, not its logits: a vocabulary is fifty times as wide.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.data import Windows, stride_of
from lq.calibration.stream import batches, embed_batches, stream
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.decoder import head
from lq.models.source import ParameterSource
from lq.numerics.sharded import to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, over how many tokens, by which protocol."""

    perplexity: float
    nll: float  # mean negative log-likelihood per scored token, nats
    tokens: int  # scored
    corpus: str
    protocol: str
    kl: float | None = None  # nats per token; None without a reference
    top1: float | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original model's last hidden states over some windows, and its head."""

    hidden: list[np.ndarray]  # per batch [B, S, D]
    head_params: dict  # what `decoder.head` reads
    config: ModelConfig
    fingerprint: str  # of the windows


def make_reference(source: ParameterSource, windows: Windows, *, batch_size: int = 8, dtype=jnp.float32) -> Reference:
    """Runs the original once; pass the result to every `evaluate` over the same windows."""
    hidden = _last_hidden(source, windows.tokens, batch_size, dtype)
    return Reference(hidden, head_params_of(source), source.config, windows.fingerprint)


def evaluate(
    source: ParameterSource,
    windows: Windows,
    *,
    reference: Reference | None = None,
    batch_size: int = 8,
    dtype=jnp.float32,
) -> Evaluation:
    """Measures a model, dense or packed, over `windows`.

    Args:
      source: the model, read a block at a time.
      windows: tokens `[windows, length]`, and the stride they were cut with.
      reference: the original over the same windows, for KL and top-1.
      batch_size: windows per device step; must be the reference's.
      dtype: of the computation.

    Raises:
      UserError: the reference was made over other tokens, or by a model with another vocabulary; windows longer than
        the model's context; a batch size that cannot be.
    """
    tokens = windows.tokens
    scored = scored_targets(windows)
    if reference is not None:
        if reference.fingerprint != windows.fingerprint or len(reference.hidden[0]) != min(batch_size, len(tokens)):
            raise UserError("reference: made over other windows; make it again with the same windows and batch size")
        if reference.config.vocab_size != source.config.vocab_size:
            raise UserError(
                f"reference: the original's vocabulary has {reference.config.vocab_size} tokens, the model's "
                f"{source.config.vocab_size}; give the original the model was made of"
            )
    hidden = _last_hidden(source, tokens, batch_size, dtype)
    head_params = head_params_of(source)
    totals = np.zeros(3)
    pairs = zip(batches(tokens, batch_size), batches(scored, batch_size), strict=True)
    for i, (batch, mask) in enumerate(pairs):
        original = None if reference is None else (reference.head_params, reference.hidden[i])
        original_config = None if reference is None else reference.config
        sums = window_sums(source.config, original_config, head_params, batch, mask, hidden[i], original)
        totals += np.sum(to_host(sums).astype(np.float64), axis=0)
    count = int(scored.sum())
    nll, kl, top1 = (totals / count).tolist()
    return Evaluation(
        perplexity=math.inf if nll > 700 else math.exp(nll),  # NaN stays NaN
        nll=nll,
        tokens=count,
        corpus=windows.source,
        protocol=windows.how,
        kl=None if reference is None else kl,
        top1=None if reference is None else top1,
    )


def scored_targets(windows: Windows) -> np.ndarray:
    """Bool `[windows, length - 1]`: True where target t+1 is scored in this window. Its sum is the scored tokens."""
    count, length = windows.tokens.shape
    stride = stride_of(length, windows.stride)
    mask = np.ones((count, length - 1), bool)
    mask[1:, : max(length - stride - 1, 0)] = False  # these targets were scored in the window before
    return mask


def _last_hidden(source: ParameterSource, tokens: np.ndarray, batch_size: int, dtype) -> list[np.ndarray]:
    hidden = None
    for _, _, hidden in stream(source, tokens, batch_size=batch_size, dtype=dtype):  # noqa: B007
        pass
    return embed_batches(source, tokens, batch_size, dtype) if hidden is None else hidden


def head_params_of(source: ParameterSource) -> dict:
    tied = {"embed": source.embed()} if source.config.tie_embeddings else {}
    return {"head": source.head(), **tied}


@functools.partial(jax.jit, static_argnames=("config", "original_config"))
def window_sums(config: ModelConfig, original_config: ModelConfig | None, head_params, tokens, mask, hidden, original):
    """Per window: sums of negative log-likelihood, of KL and of agreement over the scored positions. `[B, 3]` float32.

    One window after another: logits of a whole batch would be the largest array of the run.
    """

    def one_window(window):
        row, scored, h, original_h = window
        log_q = _log_probs(config, head_params, h)
        if original is None:
            return jnp.stack([_nll(log_q, row, scored), 0.0, 0.0])
        log_p = _log_probs(original_config or config, original[0], original_h)
        agree = (log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32)
        return jnp.append(_sums(log_q, log_p, row, scored), jnp.sum(agree, where=scored))

    original_hidden = hidden if original is None else original[1]
    return jax.lax.map(one_window, (tokens, mask, hidden, original_hidden))


@functools.partial(jax.jit, static_argnames="config")
def window_sums_against(config: ModelConfig, head_params, tokens, mask, hidden, log_p, which):
    """The first two of them, where the original's log-probabilities are at hand: `log_p[which]`, of `log_probs`.

    Without agreement, whose two argmax take as long as a product with the head does on a CPU.
    """

    def one_window(window):
        row, scored, h, index = window
        return _sums(_log_probs(config, head_params, h), log_p[index], row, scored)

    return jax.lax.map(one_window, (tokens, mask, hidden, which))


@functools.partial(jax.jit, static_argnames="config")
def log_probs(config: ModelConfig, head_params, hidden):
    """Log-probabilities `[B, S - 1, V]` float32 of what follows every token but the last."""
    return jax.lax.map(functools.partial(_log_probs, config, head_params), hidden)


def _log_probs(config: ModelConfig, head_params, hidden):
    return jax.nn.log_softmax(head(config, head_params, hidden[None, :-1])[0])


def _sums(log_q, log_p, row, scored):
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.stack([_nll(log_q, row, scored), jnp.sum(kl, where=scored)])


def _nll(log_q, row, scored):
    return -jnp.sum(jnp.take_along_axis(log_q, row[1:, None], axis=-1)[:, 0], where=scored)
