"""`Rewrite`: a model's new description, and each of its new leaves from the old leaves of the same part.

The words of the decoder, for all rewrites: which matrices read the residual stream, through which norm, and which write
to it. A matrix is named by its path within the part, without the trailing `kernel`; the head's is `head`.
"""

import abc
from collections.abc import Callable

import numpy as np

from lq.models.config import ModelConfig

READS = {  # matrix -> the norm in front of it
    "head": "final_norm",
    **dict.fromkeys(("attention/q_proj", "attention/k_proj", "attention/v_proj"), "attention_norm"),
    **dict.fromkeys(("mlp/gate_proj", "mlp/up_proj"), "mlp_norm"),
    **dict.fromkeys(("moe/router", "moe/gate_proj", "moe/up_proj"), "mlp_norm"),
}
NORMS = frozenset(READS.values())
WRITES = ("attention/o_proj", "mlp/down_proj", "moe/down_proj")

Read = Callable[[str], np.ndarray]  # path of a leaf of the old part, `attention/q_proj/kernel` -> its values, float64


class Rewrite(abc.ABC):
    """A rewrite of one model. Each part is rewritten on its own, so that a model can be streamed through."""

    def __init__(self, config: ModelConfig):
        self.config = config  # of the rewritten model

    @abc.abstractmethod
    def leaf(self, part: str, path: str, read: Read) -> np.ndarray | None:
        """The leaf at `path` of the rewritten part ("embed", "block_3", "head"), float64; None: as it was."""


class Chain(Rewrite):
    """One rewrite after another, without rounding between them."""

    def __init__(self, first: Rewrite, second: Rewrite):
        super().__init__(second.config)
        self._first, self._second = first, second

    def leaf(self, part: str, path: str, read: Read) -> np.ndarray | None:
        def between(path: str) -> np.ndarray:
            value = self._first.leaf(part, path, read)
            return read(path) if value is None else value

        value = self._second.leaf(part, path, between)
        return self._first.leaf(part, path, read) if value is None else value


def matrix_of(part: str, path: str) -> tuple[str, str]:
    """The matrix or norm, and which leaf of it: ("block_3", `mlp/up_proj/bias`) -> (`mlp/up_proj`, `bias`)."""
    matrix, _, leaf = path.rpartition("/")
    return matrix or part, leaf
