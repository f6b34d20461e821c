"""Models run part by part in float64, and what is made of their states in NumPy: to hold scores against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lq.models.context import context_for
from lq.models.decoder import apply_block, embed, head
from lq.models.source import InMemory


def wide(tree):
    """Every leaf in float64; inside `jax.enable_x64`."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree)


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _block(config, kind, params, h, tokens):
    return apply_block(config, kind, params, h, context_for(tokens))


def states(source, tokens) -> list[np.ndarray]:
    """Float64 states in front of every block and behind the last."""
    with jax.enable_x64(True):
        h = embed(source.config, wide({"embed": source.embed()}), tokens, context_for(jnp.asarray(tokens)))
    found = [np.asarray(h)]
    for index in range(source.config.num_blocks):
        found.append(block_output(source, tokens, index, source.block(index), found[-1]))
    return found


def rest(source, tokens, index, h) -> np.ndarray:
    """Float64 states behind the last block, from those in front of block `index`."""
    for i in range(index, source.config.num_blocks):
        h = block_output(source, tokens, i, source.block(i), h)
    return h


def block_output(source, tokens, index, params, h) -> np.ndarray:
    """Float64 output of one block with these parameters."""
    with jax.enable_x64(True):
        out = _block(source.config, source.config.kinds[index], wide(params), jnp.asarray(h), jnp.asarray(tokens))
        assert out.dtype == jnp.float64
        return np.asarray(out)


def log_probabilities(source, h) -> np.ndarray:
    """Float64 `[B, S, V]`, decoded from states as if they were the last."""
    with jax.enable_x64(True):
        params = wide({"head": source.head(), "embed": source.embed()})
        logits = np.asarray(head(source.config, params, jnp.asarray(h)))
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(log_p, log_q) -> np.ndarray:
    """Of every position."""
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def with_blocks(source, change) -> InMemory:
    """The source with every block's parameters replaced by `change(index, params)`."""
    params = dict(source.params())
    for index in range(source.config.num_blocks):
        params[f"block_{index}"] = change(index, params[f"block_{index}"])
    return InMemory(source.config, params)


def writing(block, factor):
    """A block's parameters with what it writes multiplied; for 0 it is the identity, of a model without biases."""
    new = dict(block)
    for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
        new[part] = {**block[part], name: {"kernel": factor * block[part][name]["kernel"]}}
    return new


def planted(source, which, loud=20.0, quiet=0.05) -> InMemory:
    """The source with one block that writes much, and the others little."""
    return with_blocks(source, lambda index, block: writing(block, loud if index == which else quiet))
