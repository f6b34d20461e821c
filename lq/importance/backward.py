"""Gradients of a model's loss by its matrices, from the last block to the first, with one block's weights at a time.

The forward pass keeps what goes into every block on the host. On the way back a block is run once more on its input,
and `jax.vjp` pulls the gradient at its output to its matrices and to its input, which is the output of the block
before. One window after another: a gradient of a window is reduced to a few numbers where it is made, and of all of
them, weights' size each, only one is there at a time.

    backward = Backward(source, windows)
    found = backward.gradients(source, reduce, data)      # reduce(WindowGradients, data(block index)) -> small arrays

Labels that are drawn may be drawn several times (`draws`): what is reduced is then one row for every window and draw,
and a block is run once for all of them.

Memory is one block, its gradients for one window, what `data` gives, and on the host the hidden states of all windows
at the input of every block. There is one program for each kind of block, shape of a batch and `reduce`; what `reduce`
does not read is never computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from lq.calibration.branches import branch_writers, run_branches
from lq.calibration.data import Windows
from lq.calibration.stream import batches, embed_batches, through_block
from lq.errors import UserError
from lq.evaluation.evaluate import head_params_of
from lq.importance.losses import Loss, Text, text_of, window_loss
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.matrices import block_matrices
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.numerics.sharded import to_host

Kernels = dict[str, Array]  # the matrices of a block, or something of their shapes, by path within the block


@flax.struct.dataclass
class WindowGradients:
    """A block's variables and the gradients, by each, of the loss of one window, summed over its scored positions."""

    kernels: Kernels
    kernel_gradients: Kernels
    branches: dict[str, Float[Array, "S D"]]  # what attention and the feed-forward network write, by part
    branch_gradients: dict[str, Float[Array, "S D"]]


Reduce = Callable[[WindowGradients, Any], Any]


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What `reduce` made of the gradients of every window, and the losses; float64.

    Each draw of labels counts as a window of its own.
    """

    losses: Float[np.ndarray, " windows"]  # summed over the scored positions of a window
    tokens: int  # scored positions of all windows
    blocks: list[Any]  # of every block, first to last, what `reduce` gave, `[windows, ...]`

    @property
    def loss(self) -> float:
        """Mean over the scored positions, nats."""
        return float(self.losses.sum() / self.tokens)

    def by_matrix(self) -> dict[str, np.ndarray]:
        """Of a `reduce` that gives an array for each matrix: its sum over windows per scored position, by path."""
        blocks = enumerate(self.blocks)
        return {f"block_{i}/{path}": found.sum(0) / self.tokens for i, block in blocks for path, found in block.items()}


class Backward:
    """Gradients of one loss on given windows, at any weights of the block matrices.

    `passes` counts the cost in forward passes of all windows: one forward, one more on the way back, two for the
    gradients of every draw; and one for the original where the loss is `kl`. `inputs` are the hidden states at the
    input of the block whose gradients are taken, one array a batch: for `data`.
    """

    def __init__(
        self,
        original: ParameterSource,
        windows: Windows,
        *,
        loss: Loss = "nll",
        seed: int = 0,
        draws: int = 1,
        batch_size: int = 8,
        dtype=jnp.float32,
    ):
        """`seed` is of the labels drawn for the loss `sampled`, `seed + 1` of the second draw, and so on.

        Raises UserError for windows that do not fit.
        """
        self.config, self._loss, self._dtype = original.config, loss, dtype
        self._seeds = np.arange(seed, seed + draws, dtype=np.uint32)
        self.inputs: list[np.ndarray] = []
        self._head = head_params_of(original)
        self._batches, self._text = batches(windows.tokens, batch_size), text_of(windows, batch_size)
        self._embedded = embed_batches(original, windows.tokens, batch_size, dtype)
        self.tokens = sum(int(text.scored.sum()) for text in self._text)
        self.passes = 0.0
        if loss == "kl":
            last = self._last(original)
            self._text = [
                dataclasses.replace(t, original=jnp.asarray(h)) for t, h in zip(self._text, last, strict=True)
            ]

    def loss(self, point: ParameterSource) -> float:
        """The mean loss at `point`, per scored position, nats; a forward pass."""
        losses, _ = self._pull_head(self._last(point))
        return float(losses.mean(1).sum() / self.tokens)

    def gradients(
        self, point: ParameterSource, reduce: Reduce, data: Callable[[int], Any] = lambda index: None
    ) -> Gradients:
        """Reductions of the gradients of every window.

        Args:
          point: the model that is differentiated. Embedding and head are the original's.
          reduce: what to make of the gradients of one window in one block; a stable function, since it is a static
            argument.
          data: what else it is given, by index of the block.
        """
        states = list(self._states(point))
        losses, cotangents = self._pull_head(states.pop())
        blocks = []
        for index in reversed(range(self.config.num_blocks)):
            kernels, rest = split_block(self.config, self.config.kinds[index], self._block(point, index))
            self.inputs = states.pop()
            given, found = data(index), []
            for i, row in enumerate(self._batches):
                reduced, pulled = _pull_block(
                    *(self.config, self.config.kinds[index], reduce),
                    *(kernels, rest, given, row, self.inputs[i], cotangents[i]),
                )
                cotangents[i] = to_host(pulled)
                found.append(reduced)
            blocks.append(jax.tree.map(_rows, *found))
        draws = len(self._seeds)
        self.passes += 1 + 2 * draws
        return Gradients(losses.reshape(-1), self.tokens * draws, blocks[::-1])

    def _block(self, point: ParameterSource, index: int) -> Params:
        return dense(point.block(index, self._dtype), f"block_{index}")

    def _states(self, point: ParameterSource) -> Iterator[list[np.ndarray]]:
        """Hidden states at the input of every block and behind the last, one array a batch."""
        hidden = self._embedded
        yield hidden
        for index, kind in enumerate(self.config.kinds):
            hidden = through_block(self.config, kind, self._block(point, index), self._batches, hidden)
            yield hidden
        self.passes += 1

    def _last(self, point: ParameterSource) -> list[np.ndarray]:
        hidden = self._embedded
        for hidden in self._states(point):  # noqa: B007
            pass
        return hidden

    def _pull_head(self, hidden: list[np.ndarray]) -> tuple[Float[np.ndarray, "windows draws"], list[np.ndarray]]:
        """Losses of the windows, float64, and of every batch the gradients at the last hidden states, by draw."""
        losses, cotangents = [], []
        for text, h in zip(self._text, hidden, strict=True):
            loss, gradient = _pull_head(self.config, self._loss, self._head, self._seeds, text, h)
            losses.append(to_host(loss).astype(np.float64))
            cotangents.append(to_host(gradient))
        return np.concatenate(losses), cotangents


def _rows(*parts) -> np.ndarray:
    """One row for every window and draw, float64, from arrays `[windows, draws, ...]` of batches."""
    whole = np.concatenate(parts).astype(np.float64)
    return whole.reshape(-1, *whole.shape[2:])


def dense(params: Params, part: str) -> Params:
    """`params` themselves. Raises UserError for packed ones, which have no gradient."""
    if any(is_packed(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_packed)):
        raise UserError(f"{part} is packed, and gradients are of dense weights; score the original model")
    return params


def split_block(config: ModelConfig, kind: BlockKind, params: Params) -> tuple[Kernels, dict[str, Array]]:
    """A dense block's matrices, and its other leaves by path."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    kernels = {path: flat.pop(f"{path}/kernel") for path in block_matrices(config, kind)}
    return kernels, flat


def join_block(kernels: Kernels, rest: dict[str, Array]) -> Params:
    """The inverse of `split_block`."""
    return unflatten_dict(rest | {f"{path}/kernel": kernel for path, kernel in kernels.items()}, sep="/")


@functools.partial(jax.jit, static_argnames=("config", "loss"))
def _pull_head(config: ModelConfig, loss: Loss, head_params, seeds, text: Text, hidden: Float[Array, "B S D"]):
    """Of every window and draw its loss and the gradient at its last hidden states."""

    def pull(window):
        one, h = window
        of_draw = lambda seed: jax.value_and_grad(lambda h: window_loss(config, loss, head_params, seed, one, h))(h)  # noqa: E731
        return jax.lax.map(of_draw, seeds)

    return jax.lax.map(pull, (text, hidden))


@functools.partial(jax.jit, static_argnames=("config", "kind", "reduce"))
def _pull_block(
    config: ModelConfig,
    kind: BlockKind,
    reduce: Reduce,
    kernels: Kernels,
    rest: dict[str, Array],
    data: Any,
    tokens,
    hidden: Float[Array, "B S D"],
    cotangents: Float[Array, "B draws S D"],
):
    """Of every window and draw what `reduce` gives, and the gradient at the block's input."""

    def pull(window):
        row, h, of_draws = window[0][None], window[1][None], window[2]

        def run(kernels, added, h):
            return run_branches(config, kind, join_block(kernels, rest), h, context_for(row), added)

        nothing = dict.fromkeys(branch_writers(config, kind), jnp.zeros_like(h))
        _, pull_back, branches = jax.vjp(run, kernels, nothing, h, has_aux=True)
        first = functools.partial(jax.tree.map, lambda a: a[0])

        def of_draw(cotangent):
            of_kernels, of_branches, of_input = pull_back(cotangent[None])
            found = WindowGradients(kernels, of_kernels, first(branches), first(of_branches))
            return reduce(found, data), of_input[0]

        return jax.lax.map(of_draw, of_draws)

    return jax.lax.map(pull, (tokens, hidden, cotangents))
