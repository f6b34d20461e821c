"""Every option of every matrix on the device, and what any choice among them loses, without compiling again.

The widths of a plan decide the shapes of packed weights, so that each plan is a program of its own. Here the weights of
every option are held as they are dequantized, stacked, and a choice is a vector of indices: an argument. One program
for each kind of block serves all plans. The last option is the original.

    candidates = Candidates.of(original, [int2, int3, int4])       # models that were quantized uniformly
    judge = Judge(candidates, windows)
    judge.kl({"block_0/mlp/up_proj": 1, ...})                      # per window; what is left out stays the original

Memory is that of the model as many times as there are options, and once more.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.calibration.stream import batches, embed_batch, embed_batches
from lq.errors import UserError
from lq.evaluation.evaluate import log_probs, scored_targets, window_sums, window_sums_against
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.decoder import apply_block
from lq.models.matrices import EMBEDDING, HEAD, table_matrices
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.numerics.sharded import to_host

Choice = Mapping[str, int]  # matrix path -> option

MOST_HELD = 2**30  # bytes of the original's log-probabilities; where they are more they are computed anew every time


class Candidates:
    """The matrices of a model under every option. Made by `Candidates.of`."""

    def __init__(
        self,
        original: ParameterSource,
        rest: list[Params],
        stacks: list[dict[str, Array]],
        tables: dict[str, Array],
        options: int,
    ):
        self.original, self.config = original, original.config
        self.rest, self.stacks = rest, stacks  # per block: what is in no matrix, and the options of every matrix
        self.tables = tables  # the options of embedding and head, as their parts hold them; empty where they have none
        self.options = options  # the last is the original
        self._paths = {f"block_{index}/{path}" for index, stack in enumerate(stacks) for path in stack} | tables.keys()
        self._embed, self._head = original.embed(), original.head()

    @classmethod
    def of(
        cls,
        original: ParameterSource,
        quantized: Sequence[ParameterSource],
        dtype=jnp.float32,
        *,
        tables: bool = False,
    ) -> "Candidates":
        """From models with the same matrices quantized, each its own way.

        Args:
          original: dense.
          quantized: one model for each option, in order.
          dtype: of the weights that are held.
          tables: embedding and head have options too.

        Raises:
          UserError: models that differ from the original in more than their matrices, as after scaling channels.
        """
        rest, stacks = [], []
        for index in range(original.config.num_blocks):
            models = [_split(source.block(index)) for source in (*quantized, original)]
            for option, (other, _) in enumerate(models[:-1]):
                if not _alike(other, models[-1][0]):
                    raise UserError(
                        f"candidates: option {option} has other norms or biases in block_{index} than the original; "
                        "leave out what scales channels or corrects biases"
                    )
            rest.append(models[0][0])
            stacks.append({path: jnp.stack([m[1][path].astype(dtype) for m in models]) for path in models[0][1]})
        found = {}
        for path in table_matrices(original.config) if tables else []:
            found[path] = jnp.stack([_table(source, path).astype(dtype) for source in (*quantized, original)])
        return cls(original, rest, stacks, found, len(quantized) + 1)

    def embed_params(self, choice: Choice) -> Params:
        """The part "embed"."""
        return self._with(self._embed, EMBEDDING, "embedding", choice)

    def head_params(self, choice: Choice) -> Params:
        """What `decoder.head` reads."""
        tied = {"embed": self.embed_params(choice)} if self.config.tie_embeddings else {}
        return {"head": self._with(self._head, HEAD, "kernel", choice), **tied}

    def _with(self, part: Params, path: str, leaf: str, choice: Choice) -> Params:
        """A part with the option of its table that `choice` has."""
        option = choice.get(path, self.options - 1)
        if path not in self.tables or option == self.options - 1:
            return part
        chosen = jax.lax.dynamic_index_in_dim(self.tables[path], np.int32(option), keepdims=False)
        return {**part, "tokens": {leaf: chosen}} if path == EMBEDDING else {**part, leaf: chosen}

    def indices(self, choice: Choice) -> list[dict[str, np.int32]]:
        """Per block the option of each matrix, by path within the block; the original where `choice` has none."""
        unknown = choice.keys() - self._paths
        if unknown or any(not 0 <= option < self.options for option in choice.values()):
            raise ValueError(f"choice: {sorted(unknown) or choice} of {self.options} options")
        found = []
        for index, stack in enumerate(self.stacks):
            chosen = {path: choice.get(f"block_{index}/{path}", self.options - 1) for path in stack}
            found.append({path: np.int32(option) for path, option in chosen.items()})
        return found

    def path_of(self, choice: Choice) -> tuple[tuple[int, ...], ...]:
        """The option of the embedding, then those of every block.

        As far as those of two choices are alike, their hidden states are.
        """
        blocks = [tuple(map(int, options.values())) for options in self.indices(choice)]
        return ((choice.get(EMBEDDING, self.options - 1),), *blocks)


class Judge:
    """KL divergence to the original of any choice, on given windows.

    `passes` counts what it has cost: forward passes of all windows through all blocks, parts of one as shares; the
    original's own, for reference, is the first.

    Raises UserError for windows of one token, which foretell none.
    """

    def __init__(self, candidates: Candidates, windows: Windows, *, batch_size: int = 8):
        if windows.tokens.shape[1] < 2:
            raise UserError(f"{windows.source}: windows of one token, which foretell none; write a length of 2 or more")
        self.candidates, self.windows = candidates, windows
        self._rows = batches(windows.tokens, batch_size)
        self._batches = batches(np.arange(len(windows.tokens)), batch_size)
        self._masks = scored_targets(windows)
        self._embedded: list[Array | np.ndarray] = [*embed_batches(candidates.original, windows.tokens, batch_size)]
        self._head = candidates.head_params({})
        self.passes = 0.0
        self._reference = jnp.concatenate(self.states(self._embedded, 0, {}))
        size = 4 * self._masks.size * candidates.config.vocab_size
        self._log_p = log_probs(candidates.config, self._head, self._reference) if size <= MOST_HELD else None

    def inputs(self, choice: Choice) -> list[Array | np.ndarray]:
        """The hidden states at the input of the first block, one array a batch."""
        params = self.candidates.embed_params(choice)
        if params is self.candidates.embed_params({}):
            return self._embedded
        return [embed_batch(self.candidates.config, params, rows) for rows in self._rows]

    def kl(self, choice: Choice) -> Float[np.ndarray, " windows"]:
        """Mean KL per scored token of every window, nats, float64."""
        return self.kl_of([choice])[0]

    def kl_of(
        self, choices: Sequence[Choice], windows: Sequence[int] | None = None
    ) -> Float[np.ndarray, "choices windows"]:
        """The same of several choices, on all windows or on some.

        What choices have in common from the first block on is computed once: they are taken in the order of their
        options, and each goes on where it parts from the one before. The hidden states of a batch are held in front of
        every block for that.
        """
        drawn = np.arange(len(self.windows.tokens)) if windows is None else np.asarray(windows)
        paths = [self.candidates.path_of(choice) for choice in choices]
        order = sorted(range(len(choices)), key=paths.__getitem__)
        found, batch_size = np.empty((len(choices), len(drawn))), len(self._batches[0])
        for first in range(0, len(drawn), batch_size):
            which = drawn[first : first + batch_size]
            for i, states in zip(order, self._along([choices[i] for i in order], which), strict=True):
                found[i, first : first + len(which)] = self._losses(choices[i], which, states)[:, 1]
        return found

    def _along(self, choices: Sequence[Choice], which: np.ndarray) -> Iterator[Array]:
        """States behind the last block, of one choice after the other, on the windows `which`."""
        tokens, before = self.windows.tokens[which], ()
        held: list[Array] = []  # behind the embedding and behind every block
        for choice in choices:
            path = self.candidates.path_of(choice)
            alike = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, path, strict=False))
            )
            del held[alike:]
            if not held:
                held.append(embed_batch(self.candidates.config, self.candidates.embed_params(choice), tokens))
            for index, options in list(enumerate(self.candidates.indices(choice)))[len(held) - 1 :]:
                held.append(self._through(index, options, tokens, held[-1]))
            before = path
            yield held[-1]

    def kl_from(
        self, states: Sequence[Array | np.ndarray], block: int, choice: Choice
    ) -> Float[np.ndarray, " windows"]:
        """The KL from the hidden states at the input of `block`, one array a batch, as `states` gives them."""
        return self.losses_from(states, block, choice)[:, 1]

    def losses_from(
        self, states: Sequence[Array | np.ndarray], block: int, choice: Choice
    ) -> Float[np.ndarray, "windows 2"]:
        """The mean negative log-likelihood per scored token as well, in front of the KL."""
        final = zip(self._batches, self.states(states, block, choice), strict=True)
        return np.concatenate([self._losses(choice, which, h) for which, h in final])

    def states(
        self, states: Sequence[Array | np.ndarray], block: int, choice: Choice, until: int | None = None
    ) -> list[Array]:
        """Hidden states behind the blocks from `block` to before `until` (all when None), from those at its input."""
        found, indices = [jnp.asarray(h) for h in states], self.candidates.indices(choice)
        for index in range(block, len(indices) if until is None else until):
            pairs = zip(self._rows, found, strict=True)
            found = [self._through(index, indices[index], tokens, h) for tokens, h in pairs]
        return found

    def _through(self, index: int, options: Mapping[str, np.int32], tokens: np.ndarray, h: Array) -> Array:
        """The states after block `index`, its matrices at `options`."""
        candidates, config = self.candidates, self.candidates.config
        self.passes += tokens.size / self.windows.tokens.size / config.num_blocks
        kind, rest, stack = config.kinds[index], candidates.rest[index], candidates.stacks[index]
        return _chosen_block(config, kind, rest, stack, options, tokens, h)

    def _losses(self, choice: Choice, which: np.ndarray, final: Array) -> Float[np.ndarray, "windows 2"]:
        """Mean negative log-likelihood and mean KL of the windows `which`, from the states behind the last block."""
        config, head, masks = self.candidates.config, self.candidates.head_params(choice), self._masks[which]
        tokens = self.windows.tokens[which]
        if self._log_p is None:
            sums = window_sums(config, config, head, tokens, masks, final, (self._head, self._reference[which]))
        else:
            sums = window_sums_against(config, head, tokens, masks, final, self._log_p, which)
        return to_host(sums).astype(np.float64)[:, :2] / masks.sum(1)[:, None]


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _chosen_block(config: ModelConfig, kind: BlockKind, rest: Params, stack: dict[str, Array], indices, tokens, h):
    """A block with the options at `indices`, which are traced."""
    chosen = {path: jax.lax.dynamic_index_in_dim(stack[path], indices[path], keepdims=False) for path in stack}
    flat = flatten_dict(rest, sep="/") | {f"{path}/kernel": kernel for path, kernel in chosen.items()}
    return apply_block(config, kind, unflatten_dict(flat, sep="/"), h, context_for(tokens))


def _split(block: Params) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is in no matrix, as a tree in float32, and the matrices dequantized, by path."""
    flat: dict[str, Any] = flatten_dict(block, sep="/", is_leaf=lambda _, leaf: is_packed(leaf))
    kernels = {path.removesuffix("/kernel"): leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    matrices = {path: leaf for path, leaf in kernels.items() if not path.endswith("router")}
    rest = {path: leaf for path, leaf in flat.items() if path.removesuffix("/kernel") not in matrices}
    dense = {path: leaf.dequantize() if is_packed(leaf) else leaf for path, leaf in matrices.items()}
    return unflatten_dict({path: jnp.asarray(leaf, jnp.float32) for path, leaf in rest.items()}, sep="/"), dense


def _table(source: ParameterSource, path: str) -> Array:
    """Dense, as its part holds it: the embedding `[rows, channels]`, the head `[channels, vocabulary]`."""
    leaf = source.embed()["tokens"]["embedding"] if path == EMBEDDING else source.head()["kernel"]
    if not is_packed(leaf):
        return leaf
    return leaf.dequantize().T if path == EMBEDDING else leaf.dequantize()


def _alike(a: Params, b: Params) -> bool:
    """Whether both are the same once they are kept in 16 bits, as what stays dense is."""
    flat = [flatten_dict(tree, sep="/") for tree in (a, b)]
    stored = lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16))  # noqa: E731
    return flat[0].keys() == flat[1].keys() and all(
        np.array_equal(stored(flat[0][path]), stored(flat[1][path])) for path in flat[0]
    )
