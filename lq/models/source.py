"""`ParameterSource`: where the weights of a model come from, one part at a time.

A part is a top-level key of the parameter tree: "embed", "block_0" to "block_{L-1}", "head". Code that streams a model
asks a source for one part after another and holds no more than one; whether the parts lie in memory or in files is the
source's business.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lq.models.config import ModelConfig
from lq.numerics.segmented import is_packed

Params = dict[str, Any]  # nested; leaves are jax arrays, QTensors or SegmentedQTensors
PLACES = 16


class ParameterSource(Protocol):
    """A model's description and its parameters. Sources subclass this and write `part`."""

    config: ModelConfig

    def part(self, name: str, dtype=None) -> Params:
        """The parameters under one top-level key, dense ones in `dtype` (as they are stored when None)."""
        ...

    def samples(self, name: str) -> dict[str, np.ndarray]:
        """What `sampled` takes of every leaf of a part, by path within the part; a packed leaf has one path an array.

        Sources that can do so without reading the part override this.
        """
        leaves = jax.tree_util.tree_leaves_with_path(self.part(name))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): sampled(leaf) for path, leaf in leaves}

    def embed(self, dtype=None) -> Params:
        return self.part("embed", dtype)

    def block(self, index: int, dtype=None) -> Params:
        """Raises IndexError outside 0 to `config.num_blocks - 1`."""
        if not 0 <= index < self.config.num_blocks:
            raise IndexError(f"block {index} of a model with {self.config.num_blocks} blocks")
        return self.part(f"block_{index}", dtype)

    def head(self, dtype=None) -> Params:
        return self.part("head", dtype)

    def params(self, dtype=None) -> Params:
        """All of it, as `Decoder.apply` takes it."""
        blocks = {f"block_{i}": self.block(i, dtype) for i in range(self.config.num_blocks)}
        return {"embed": self.embed(dtype), **blocks, "head": self.head(dtype)}


def part_names(source: ParameterSource) -> list[str]:
    """The parts of a model, in the order in which they are computed."""
    return ["embed", *(f"block_{i}" for i in range(source.config.num_blocks)), "head"]


class InMemory(ParameterSource):
    """Parameters that are already there, dense or packed."""

    def __init__(self, config: ModelConfig, params: Params):
        self.config = config
        self._params = params

    def part(self, name: str, dtype=None) -> Params:
        def cast(leaf):
            return leaf if dtype is None or is_packed(leaf) else leaf.astype(dtype)

        return jax.tree.map(cast, self._params[name], is_leaf=is_packed)


class Dequantized(ParameterSource):
    """Another source, packed leaves as the dense matrices they stand for: one program serves every plan of a model."""

    def __init__(self, source: ParameterSource):
        self.config = source.config
        self._source = source

    def part(self, name: str, dtype=None) -> Params:
        def dense(leaf):
            return leaf.dequantize(dtype or jnp.float32) if is_packed(leaf) else leaf

        return jax.tree.map(dense, self._source.part(name, dtype), is_leaf=is_packed)


def sampled(array: jax.Array | np.ndarray) -> np.ndarray:
    """A vector as it is; of a matrix, or of each in a stack, the elements where up to `PLACES` rows and columns cross.

    The rows and columns are evenly spaced, the first and the last among them.
    """
    if array.ndim < 2:
        return np.asarray(array)
    rows, columns = (np.unique(np.linspace(0, n - 1, PLACES).astype(int)) for n in array.shape[-2:])
    return np.asarray(array[..., rows[:, None], columns])
