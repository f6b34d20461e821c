"""Which weights of a model are matrices that can be quantized, and their shapes, known without loading any.

A matrix is named by its path in the parameter tree without the trailing `kernel`: `block_3/attention/q_proj`. The
logical shape is `[in, out]`; a routed block's are stacks `[experts, in, out]`. Routers, norms and biases are never
quantized: they are few, and a router's error sends tokens to the wrong expert. The embedding is `embed/tokens`, seen as
its head's matrix `[channels, vocabulary]`; an untied head is `head`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp

from lq.models.config import BlockKind, ModelConfig

EMBEDDING, HEAD = "embed/tokens", "head"


@functools.cache
def block_shapes(config: ModelConfig, kind: BlockKind) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one block, by path within the block: `attention/q_proj/kernel`."""
    from lq.models.context import context_for
    from lq.models.decoder import Block
    from lq.models.layers import unboxed

    tokens = jnp.zeros((1, 1), jnp.int32)
    h = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.float32)
    tree = jax.eval_shape(lambda h: Block(config, kind).init(jax.random.key(0), h, context_for(tokens)), h)
    flat, _ = jax.tree_util.tree_flatten_with_path(unboxed(tree["params"]))
    return {"/".join(key.key for key in path): tuple(leaf.shape) for path, leaf in flat}


def block_matrices(config: ModelConfig, kind: BlockKind) -> dict[str, tuple[int, ...]]:
    """Shape of every quantizable matrix of one block, by path within the block."""
    shapes = block_shapes(config, kind)
    named = {path.removesuffix("/kernel"): shape for path, shape in shapes.items() if path.endswith("/kernel")}
    return {path: shape for path, shape in named.items() if not path.endswith("router")}


def matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every quantizable matrix of every block, first block first; not the embedding and head."""
    found = {}
    for index, kind in enumerate(config.kinds):
        for path, shape in block_matrices(config, kind).items():
            found[f"block_{index}/{path}"] = shape
    return found


def table_matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The embedding, and the head where it is a weight of its own."""
    shape = (config.hidden_size, config.vocab_size)
    return {EMBEDDING: shape} if config.tie_embeddings else {EMBEDDING: shape, HEAD: shape}


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every matrix of a model: the blocks' in order, then embedding and head."""
    return {**matrices(config), **table_matrices(config)}


def other_weights(config: ModelConfig) -> int:
    """How many weights are in no matrix: norms, biases, learned positions, routers."""
    return parameter_count(config) - sum(map(math.prod, model_shapes(config).values()))


def parameter_count(config: ModelConfig) -> int:
    """All parameters, norms and biases included."""
    blocks = sum(math.prod(s) for kind in config.kinds for s in block_shapes(config, kind).values())
    tables = sum(math.prod(s) for s in table_matrices(config).values())
    norm = config.hidden_size * (2 if (config.final_norm or config.norm) == "layernorm" else 1)
    positions = 0
    if config.learned_position_offset is not None:
        positions = (config.max_positions + config.learned_position_offset) * config.hidden_size
    return blocks + tables + norm + positions


def block_of(path: str) -> int | None:
    """The index of the block a matrix belongs to; None for the embedding and the head."""
    match = re.match(r"block_(\d+)(?:/|$)", path)
    return int(match[1]) if match else None
