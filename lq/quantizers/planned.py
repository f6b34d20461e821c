"""`PlannedSource`: a model that is quantized as it is read, one part at a time."""

from collections.abc import Mapping, MutableMapping

import jax
import jax.numpy as jnp

from lq.models.source import ParameterSource, Params
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_part

DENSE_DTYPE = jnp.bfloat16  # what a float32 leaf that stays dense becomes


class PlannedSource(ParameterSource):
    """The parts of `source` with the matrices in `specs` packed; what stays dense is kept in 16 bits.

    Args:
      source: the original.
      specs: matrix path -> spec.
      method, options: the quantizer, by name, and its options.
      cache: keeps packed parts between sources that share it, by part and specs; for comparing many plans of a model
        that fits in memory. None: every read quantizes again.
    """

    def __init__(
        self,
        source: ParameterSource,
        specs: Mapping[str, QuantSpec],
        method: str,
        options,
        cache: MutableMapping | None = None,
    ):
        self.config = source.config
        self._source, self._specs, self._method, self._options = source, specs, method, options
        self._cache = cache

    def part(self, name: str, dtype=None) -> Params:
        mine = {path: spec for path, spec in self._specs.items() if path.split("/")[0] == name}
        key = (name, tuple(mine.items()), self._method, self._options)
        if self._cache is not None and key in self._cache:
            params = self._cache[key]
        else:
            packed = quantize_part(self._source.part(name), name, mine, self._method, self._options)
            params = jax.tree.map(_sixteen_bits, packed, is_leaf=_is_packed)
            if self._cache is not None:
                self._cache[key] = params
        if dtype is None:
            return params
        return jax.tree.map(lambda leaf: leaf if _is_packed(leaf) else leaf.astype(dtype), params, is_leaf=_is_packed)


def _is_packed(leaf) -> bool:
    return isinstance(leaf, QTensor)


def _sixteen_bits(leaf):
    return leaf.astype(DENSE_DTYPE) if not _is_packed(leaf) and leaf.dtype == jnp.float32 else leaf
