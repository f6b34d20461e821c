"""`PlannedSource`: a model that is quantized as it is read, any part at any time, by a method that needs no text."""

from collections.abc import Mapping, MutableMapping

import jax
import jax.numpy as jnp

from lq.models.layout import place_part
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_part
from lq.quantizers.placement import Place, over_local_devices
from lq.quantizers.recipe import Recipe

DENSE_DTYPE = jnp.bfloat16  # what a float32 leaf that stays dense becomes


class PlannedSource(ParameterSource):
    """The parts of `source` with the matrices in `specs` packed; what stays dense is kept in 16 bits.

    Args:
      source: the original.
      specs: matrix path -> spec.
      recipe: method and options; one that needs no calibration.
      cache: keeps packed parts between sources that share it, by part and specs; for comparing many plans of a model
        that fits in memory. None: every read quantizes again.
      place: lays a weight `[K, N]` out over devices while it is quantized; those of this process when None.
    """

    def __init__(
        self,
        source: ParameterSource,
        specs: Mapping[str, QuantSpec],
        recipe: Recipe,
        cache: MutableMapping | None = None,
        *,
        place: Place | None = None,
    ):
        recipe.check(source.config, specs)
        self.config = source.config
        self._source, self._specs, self._recipe = source, specs, recipe
        self._cache, self._place = cache, place or over_local_devices()

    def part(self, name: str, dtype=None) -> Params:
        mine = {path: spec for path, spec in self._specs.items() if path.split("/")[0] == name}
        key = (name, tuple(mine.items()), self._recipe)
        if self._cache is not None and key in self._cache:
            params = self._cache[key]
        else:
            packed = quantize_part(self._source.part(name), name, mine, self._recipe, self._place)
            params = place_part(self.config, name, sixteen_bits(packed))
            if self._cache is not None:
                self._cache[key] = params
        return params if dtype is None else sixteen_bits(params, dtype)


def sixteen_bits(params: Params, dtype=None) -> Params:
    """What stays dense as it is stored, float32 rounded to `DENSE_DTYPE`; and then in `dtype`, unless that is None."""

    def rounded(leaf):
        if is_packed(leaf):
            return leaf
        leaf = leaf.astype(DENSE_DTYPE) if leaf.dtype == jnp.float32 else leaf
        return leaf if dtype is None else leaf.astype(dtype)

    return jax.tree.map(rounded, params, is_leaf=is_packed)
