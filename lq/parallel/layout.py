"""Where every array of a model lies on a mesh: its parameters, dense or packed, batches, caches."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lq.models.config import ModelConfig
from lq.models.decoder import logical_axes
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.numerics.sharded import STORED, Axes, Cut, cut_of, cuts_inputs, cuts_outputs, leaf_specs
from lq.parallel.rules import RULES


def leaf_sharding(leaf: Any, axes: Axes, mesh: Mesh) -> Any:
    """A tree of shardings for the arrays of one parameter.

    Args:
      leaf: an array or a packed tensor; shapes and specs are looked at alone.
      axes: logical names of its axes, as `lq.models.decoder.logical_axes` gives them.
      mesh: of `make_mesh`.
    """
    with nn.logical_axis_rules(RULES):
        if not is_packed(leaf) and len(leaf.shape) < 2:
            spec = nn.logical_to_mesh_axes(axes) or P()
            fits = [name if leaf.shape[i] % mesh.shape.get(name, 1) == 0 else None for i, name in enumerate(spec)]
            specs = P(*fits)
        else:
            specs = leaf_specs(leaf, _stored(leaf, axes, cut_of(leaf, axes, mesh), mesh))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))


def _stored(leaf: Any, axes: Axes, cut: Cut, mesh: Mesh) -> Cut:
    """The cut of a product, and along the axes of the mesh that only store weights apart as well, where one fits."""
    for name in sorted(STORED):
        pieces = mesh.shape[name]
        if pieces == 1 or name not in (nn.logical_to_mesh_axes(axes) or ()):
            continue
        along = {"inputs": (cut.inputs, cuts_inputs), "outputs": (cut.outputs, cuts_outputs)}
        for side, (taken, fits) in sorted(along.items(), key=lambda item: item[1][0] is not None):
            if fits(leaf, pieces * (1 if taken is None else mesh.shape[taken])):
                both: Any = name if taken is None else (taken, name)
                return Cut(**{"inputs": cut.inputs, "outputs": cut.outputs, "experts": cut.experts, side: both})
    return cut


def shardings(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """The tree of `params`, whole or some of its parts, real or abstract, with a sharding for every array."""
    named = logical_axes(config)
    return {part: _of_part(tree, named[part], mesh) for part, tree in params.items()}


def _of_part(tree: Params, named: Any, mesh: Mesh) -> Params:
    if isinstance(tree, dict):
        return {name: _of_part(child, named[name], mesh) for name, child in tree.items()}
    axes = tuple(named)
    if is_packed(tree) and isinstance(named, P) and axes[:1] == ("vocab",):
        axes = axes[::-1]  # a packed table is its head's matrix
    return leaf_sharding(tree, axes, mesh)


def place(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """`params` on the mesh."""
    return jax.device_put(params, shardings(config, params, mesh))


class Placed(ParameterSource):
    """The parts of another source, put onto a mesh as they are read."""

    def __init__(self, source: ParameterSource, mesh: Mesh):
        self.config, self._source, self._mesh = source.config, source, mesh

    def part(self, name: str, dtype=None) -> Params:
        return place(self.config, {name: self._source.part(name, dtype)}, self._mesh)[name]
