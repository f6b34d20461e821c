"""Transformed models: one part at a time, or whole in memory."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.matrices import block_of, block_shapes
from lq.models.source import InMemory, ParameterSource, Params
from lq.transforms.registry import TRANSFORMS


class TransformedSource(ParameterSource):
    """The model of `source`, transformed as it is read. `config` is the transformed model's.

    A part is rewritten from that part alone, a leaf at a time in float64 on the host. Leaves that change are rounded to
    float32, or to the dtype that is asked for; what does not change is as it was, dtype included. (In 16 bits, rotated
    weights would have been rounded twice.)

    Args:
      source: the original, dense.
      transform: a name in `TRANSFORMS`.
      options: fields of its options.

    Raises:
      UserError: an unknown transform or option, or a model it cannot be applied to; and as a part is read, a weight
        that is not dense.
    """

    def __init__(self, source: ParameterSource, transform: str, options: Mapping[str, Any] | None = None):
        chosen = TRANSFORMS.options(transform, options or {})
        self._source = source
        self._rewrite = TRANSFORMS[transform].function(source.config, chosen)
        self.config: ModelConfig = self._rewrite.config

    def part(self, name: str, dtype=None) -> Params:
        old = flatten_dict(self._source.part(name), sep="/")
        for path, leaf in old.items():
            if not isinstance(leaf, jax.Array | np.ndarray):
                raise UserError(f"{name}/{path} is packed; transform the original model, and quantize the result")
        rounded = dtype or jnp.result_type(jnp.float32, *old.values())  # float64 where the weights are

        def read(path: str) -> np.ndarray:
            return np.asarray(old[path]).astype(np.float64)

        def leaf(path: str) -> jax.Array:
            value = self._rewrite.leaf(name, path, read)
            return jnp.asarray(old[path], dtype) if value is None else jnp.asarray(value.astype(rounded))

        index = block_of(name)  # norms may lose their biases, and matrices get some
        paths = old if index is None else block_shapes(self.config, self.config.kinds[index])
        return unflatten_dict({path: leaf(path) for path in paths}, sep="/")


def transform(
    config: ModelConfig, params: Params, name: str, options: Mapping[str, Any] | None = None, dtype=None
) -> tuple[ModelConfig, Params]:
    """A model in memory, transformed: (its config, its parameters). Arguments and errors as for `TransformedSource`."""
    source = TransformedSource(InMemory(config, params), name, options)
    return source.config, source.params(dtype)
