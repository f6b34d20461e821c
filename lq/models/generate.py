"""Continuing prompts: greedy or sampled, through the key/value cache.

A call is one compiled program: the prompts, padded on the left, fill the cache in one pass, then a loop on the device
decodes a token at a time until every row has stopped. Prompt length and number of new tokens are rounded up to
multiples of `STEP`, so that calls of about the same size share the program.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.context import DecodeState, context_for
from lq.models.decoder import Decoder, embed
from lq_kernels.kv_cache import KVCacheSpec

STEP = 32  # a group of the quantized cache too: a row's groups then do not depend on the padding before it
KV_BITS = (4, 8, 16)


class Sampling(NamedTuple):
    """How a token is drawn; traced, so that changing it compiles nothing."""

    temperature: ArrayLike  # divides the logits; positive
    top_k: ArrayLike  # at most the vocabulary
    top_p: ArrayLike  # at most 1


def generate(
    model: Decoder,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    kv_bits: int = 16,
) -> list[list[int]]:
    """The continuation of each prompt, without the prompt.

    Args:
      model: the decoder.
      params: its parameters, dense or packed.
      prompts: token ids, one sequence a row; lengths may differ.
      max_new_tokens: where a row ends if it did not stop before.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from the k likeliest tokens only; all when None.
      top_p: then from the likeliest of these that together reach this probability; all when None.
      seed: of the draws. A row's draws depend on the seed, the row's number and the step alone.
      stop_ids: a row ends with the first of these it produces, which is kept. `config.eos_token_ids` when None; when
        empty, no row stops early.
      kv_bits: width of the key/value cache: 4 or 8, quantized as in KIVI (arXiv 2402.02750, see `lq_kernels.kv_cache`)
        beyond the newest tokens; 16 keeps it in the dtype of the computation.

    Returns:
      New token ids, one list a row, each of 1 to `max_new_tokens`.

    Raises:
      UserError: an argument is out of its range, a prompt is empty or holds an id outside the vocabulary, or a prompt
        and its new tokens do not fit in `config.max_positions`.

    A longrope model uses its long table for the whole call when the longest row may outgrow the original context.
    transformers changes tables in mid-text instead and computes the cache anew.
    """
    config = model.config
    _check(config, prompts, max_new_tokens, temperature, top_k, top_p)
    quantized = kv_cache_spec(kv_bits)
    if not prompts:
        return []
    longest = max(map(len, prompts))
    width = _round_up(longest)
    tokens = np.zeros((len(prompts), width), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    stop_ids = config.eos_token_ids if stop_ids is None else tuple(stop_ids)
    new, counts = _run(
        model,
        params,
        tokens,
        valid,
        longest + max_new_tokens,
        max_new_tokens,
        np.asarray(stop_ids or (-1,), np.int32),  # no token is -1
        Sampling(
            temperature=np.float32(temperature),
            top_k=np.int32(min(top_k or config.vocab_size, config.vocab_size)),
            top_p=np.float32(1.0 if top_p is None else top_p),
        ),
        np.uint32(seed % 2**32),
        room=_round_up(max_new_tokens),
        greedy=temperature == 0,
        quantized=quantized,
    )
    return [row[:count].tolist() for row, count in zip(np.asarray(new), np.asarray(counts), strict=True)]


def kv_cache_spec(bits: int) -> KVCacheSpec | None:
    """How a cache of `bits` bits is quantized; None at 16. UserError for a width there is none of."""
    if bits not in KV_BITS:
        raise UserError(f"kv_bits: {bits}; write 4 or 8, or 16 for a cache that is not quantized")
    return None if bits == 16 else KVCacheSpec(bits=bits)


def cache_nbytes(
    model: Decoder, params, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, kv_bits: int = 16
) -> int:
    """Bytes of keys and values that `generate` allocates for these arguments. Allocates nothing."""
    capacity = _round_up(max(map(len, prompts))) + _round_up(max_new_tokens)
    dtype, quantized = _compute_dtype(model, params), kv_cache_spec(kv_bits)
    empty = lambda: DecodeState.empty(model.config, len(prompts), capacity, dtype, quantized=quantized)  # noqa: E731
    return jax.eval_shape(empty).cache_nbytes


def decode_continuation(tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that the tokens `new` add to those of `prompt`, special tokens left out.

    It is what the text of both has beyond the prompt's: decoded on its own, a continuation would lose its first space
    to tokenizers in SentencePiece's manner, which write a word's space into the word. Where the prompt's text is not
    the beginning of the whole (a character cut in two by the prompt's end), `new` is decoded on its own.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(new, skip_special_tokens=True)


class _Progress(NamedTuple):
    """What the decoding loop carries."""

    written: Int[Array, ""]  # new tokens so far, of rows that have not stopped
    last: Int[Array, " B"]  # the newest token, not yet fed
    state: DecodeState
    new: Int[Array, "B room"]
    counts: Int[Array, " B"]
    stopped: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnames=("model", "room", "greedy", "quantized"))
def _run(
    model: Decoder,
    params,
    tokens,
    valid,
    length,
    limit,
    stop_ids,
    sampling,
    seed,
    *,
    room: int,
    greedy: bool,
    quantized: KVCacheSpec | None,
):
    """Prefill and decoding loop. Returns `[B, room]` tokens and how many of each row count."""
    batch, width = tokens.shape

    def feed(tokens, state, valid=None):
        logits, state = model.apply({"params": params}, tokens, state, valid, logits_to_keep=1, method="step")
        return logits[:, 0], state

    def choose(logits, step):
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step))
        return jax.vmap(sample, in_axes=(0, 0, None))(logits, keys(jnp.arange(batch)), sampling)

    def record(progress: _Progress, logits, state) -> _Progress:
        token = choose(logits, progress.written)
        return _Progress(
            written=progress.written + 1,
            last=token,
            state=state,
            new=progress.new.at[:, progress.written].set(token),
            counts=progress.counts + ~progress.stopped,
            stopped=progress.stopped | jnp.isin(token, stop_ids),
        )

    def unfinished(progress: _Progress):
        return (progress.written < limit) & ~progress.stopped.all()

    def advance(progress: _Progress) -> _Progress:
        return record(progress, *feed(progress.last[:, None], progress.state))

    dtype = _compute_dtype(model, params)
    state = DecodeState.empty(model.config, batch, width + room, dtype, length, quantized)
    zeros = jnp.zeros(batch, jnp.int32)
    start = _Progress(jnp.int32(0), zeros, state, jnp.zeros((batch, room), jnp.int32), zeros, jnp.zeros(batch, bool))
    progress = record(start, *feed(tokens, state, valid))
    progress = jax.lax.while_loop(unfinished, advance, progress)
    return progress.new, progress.counts


def _compute_dtype(model: Decoder, params):
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda p: embed(model.config, p, token, context_for(token), model.dtype), params).dtype


def sample(logits: Float[Array, " V"], key: jax.Array, sampling: Sampling) -> Int[Array, ""]:
    """Draws a token id: temperature, then top-k, then top-p (nucleus sampling, arXiv 1904.09751) of what is left."""
    order = jnp.argsort(-logits, stable=True)  # likeliest first; equal ones by id, as argmax would
    ranked = logits[order] / sampling.temperature
    ranked = jnp.where(jnp.arange(ranked.size) < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    likelier = jnp.cumsum(probability) - probability  # the mass of all tokens before this one; 0 for the first
    ranked = jnp.where(likelier < sampling.top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)


def _round_up(length: int) -> int:
    return -(-length // STEP) * STEP


def _check(config: ModelConfig, prompts, max_new_tokens: int, temperature: float, top_k, top_p) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens}; write 1 or more")
    if not temperature >= 0:
        raise UserError(f"temperature: {temperature}; write 0 for the likeliest token, or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k: {top_k}; write 1 or more, or leave it out")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p}; write a number above 0 and up to 1, or leave it out")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {row}: empty; give at least one token, for example the beginning-of-text token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            worst = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"prompt {row}: token {worst} is outside the vocabulary of {config.vocab_size}")
        room = config.max_positions - len(prompt)
        if max_new_tokens > room:
            shorter = f"write max_new_tokens {room} or less" if room > 0 else "shorten the prompt"
            raise UserError(
                f"prompt {row}: {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's "
                f"{config.max_positions} positions; {shorter}"
            )
