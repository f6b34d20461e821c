"""Statistics of what goes into the matrices of a block, reduced inside jit; activations never leave the device.

Matrices that read the very same tensor (query, key and value projections; gate and up) are one *input*, measured once.
Which do is found by running the block abstractly, so it holds for every family and for whatever a transform puts
between two matrices: what is seen is what the matrix is applied to.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.calibration.statistics import SAMPLE_ROWS, InputStats, reduce_inputs
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.decoder import Block
from lq.models.layers import TOKEN_OF_ROW, Linear, StackedLinear, unboxed
from lq.models.matrices import block_matrices
from lq.models.source import Params

TILE = 128  # rows of one expert that are reduced at once


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor that matrices of a block are applied to."""

    readers: tuple[str, ...]  # paths within the block, `attention/q_proj`
    experts: int | None = None  # rows are sorted by expert and the readers are stacks of this many


@functools.cache
def block_inputs(config: ModelConfig, kind: BlockKind) -> tuple[Input, ...]:
    """The inputs of a block's quantizable matrices, in the order in which they are computed."""
    found: list[Input] = []

    def note(seen: "_Seen") -> None:
        found[:] = [Input(tuple(paths), seen.experts(paths[0])) for _, paths in seen.tensors]

    def run(params, h, tokens):
        _observe(config, kind, params, h, tokens, note)

    h = jax.ShapeDtypeStruct((1, 2, config.hidden_size), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    abstract = jax.eval_shape(
        lambda h, tokens: Block(config, kind).init(jax.random.key(0), h, context_for(tokens)), h, tokens
    )
    jax.eval_shape(run, unboxed(abstract["params"]), h, tokens)
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("config", "kind", "which", "needs", "rows"))
def input_statistics(
    config: ModelConfig,
    kind: BlockKind,
    params: Params,
    h: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    weights: Float[Array, "B S"] | None,
    which: tuple[int, ...],
    needs: frozenset[str],
    rows: int = SAMPLE_ROWS,
) -> list[InputStats]:
    """Statistics of the inputs `which` (indices into `block_inputs`) over one batch.

    Args:
      config, kind, params: the block; what lies behind the last of these inputs is not computed.
      h, tokens: the block's input and the tokens it belongs to.
      weights: of each token in every sum, 1 when None.
      needs: fields of `InputStats` to fill.
      rows: how many rows the sample has at most.
    """
    measured: list[InputStats] = []
    wanted = [block_inputs(config, kind)[i] for i in which]

    def reduce(seen: "_Seen") -> None:
        tensors = {tuple(paths): x for x, paths in seen.tensors}
        flat = None if weights is None else weights.reshape(-1)
        for one in wanted:
            x = tensors[one.readers].reshape(-1, tensors[one.readers].shape[-1])
            if one.experts is None:
                measured.append(reduce_inputs(x, needs, flat, rows))
            else:
                counts, token_of_row = seen.routing[one.readers[0]]
                each = None if flat is None else flat[token_of_row]
                measured.append(reduce_expert_inputs(x, counts, needs, each, rows))

    _observe(config, kind, params, h, tokens, reduce)
    return measured


def reduce_expert_inputs(
    x: Float[Array, "R K"],
    counts: Int[Array, " E"],
    needs: frozenset[str],
    weights: Float[Array, " R"] | None = None,
    rows: int = SAMPLE_ROWS,
) -> InputStats:
    """`reduce_inputs` for every expert, `x` sorted by expert and `counts` rows for each: every field `[E, ...]`.

    The rows of an expert are moved to where a tile begins, so that a tile is one expert's: the work is that of the rows
    and at most one tile more for each expert, not that of all rows for all experts.
    """
    (R, K), E = x.shape, counts.shape[0]
    x = x.astype(jnp.float32)
    ends = jnp.cumsum(counts)
    tiles = -(-counts // TILE)
    first_tile = jnp.cumsum(tiles) - tiles
    expert = jnp.repeat(jnp.arange(E), counts, total_repeat_length=R)
    place = first_tile[expert] * TILE + jnp.arange(R) - (ends - counts)[expert]
    total_tiles = R // TILE + E
    padded = jnp.zeros((total_tiles * TILE, K), jnp.float32).at[place].set(x)
    weight = jnp.zeros(total_tiles * TILE, jnp.float32).at[place].set(1.0 if weights is None else weights)
    owner = jnp.repeat(jnp.arange(E), tiles, total_repeat_length=total_tiles)
    sums = needs - {"sample"}

    def add(i, stats: InputStats) -> InputStats:
        rows_of = lambda a: jax.lax.dynamic_slice_in_dim(a, i * TILE, TILE)  # noqa: E731
        tile = reduce_inputs(rows_of(padded), sums, rows_of(weight))
        total, new = (dataclasses.replace(one, peak=None) for one in (stats, tile))
        summed = jax.tree.map(lambda total, new: total.at[owner[i]].add(new), total, new)
        peak = None if stats.peak is None else stats.peak.at[owner[i]].max(tile.peak)
        return dataclasses.replace(summed, peak=peak)

    empty = jax.eval_shape(lambda: reduce_inputs(padded[:TILE], sums, weight[:TILE]))
    zero = jax.tree.map(lambda leaf: jnp.zeros((E, *leaf.shape), leaf.dtype), empty)
    stats = jax.lax.fori_loop(0, total_tiles, add, zero)
    if "sample" not in needs:
        return stats
    # Evenly spaced rows of each expert; zeros, which change no error of a product, where it has fewer.
    spacing = jnp.maximum(-(-counts // rows), 1)[:, None] * jnp.arange(rows)
    inside = spacing < counts[:, None]
    sample = x.at[jnp.where(inside, (ends - counts)[:, None] + spacing, R)].get(mode="fill", fill_value=0.0)
    return dataclasses.replace(stats, sample=sample)


class _Seen:
    """What the matrices of a block were applied to, in order."""

    def __init__(self, quantizable: frozenset[str]):
        self.quantizable = quantizable
        self.tensors: list[tuple[Array, list[str]]] = []
        self.routing: dict[str, tuple[Array, Array]] = {}  # of a stack: rows per expert, and each row's token

    def experts(self, path: str) -> int | None:
        return self.routing[path][0].shape[0] if path in self.routing else None

    def add(self, path: str, x: Array) -> None:
        for tensor, paths in self.tensors:
            if tensor is x:
                paths.append(path)
                return
        self.tensors.append((x, [path]))

    def intercept(self, next_function, args, kwargs, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        path = "/".join(module.path)
        if (
            context.method_name == "__call__"
            and isinstance(module, Linear | StackedLinear)
            and path in self.quantizable
        ):
            self.add(path, args[0])
            if isinstance(module, StackedLinear):
                parent: Any = module.parent
                token_of_row = parent.get_variable("intermediates", TOKEN_OF_ROW)[0]
                self.routing[path] = (args[1], token_of_row)
        return next_function(*args, **kwargs)


def _observe(config: ModelConfig, kind: BlockKind, params: Params, h, tokens, use) -> None:
    """Runs a block and hands `use` what was seen; inside a trace only what `use` computes is."""
    seen = _Seen(frozenset(block_matrices(config, kind)))
    with nn.intercept_methods(seen.intercept):
        Block(config, kind).apply({"params": params}, h, context_for(tokens), mutable=["intermediates"])
    use(seen)
