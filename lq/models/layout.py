"""Where every array of a model lies on a mesh: its parameters, dense or packed.

The mesh and the rules from logical axes to its axes are those in force (`lq.parallel.use`); without one, arrays go to
the default device.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from lq.models.config import ModelConfig
from lq.models.decoder import logical_axes
from lq.models.source import Params
from lq.numerics.segmented import is_packed
from lq.numerics.sharded import Axes, active_mesh, leaf_shardings


@functools.cache
def axes_by_path(config: ModelConfig) -> dict[str, Axes]:
    """The logical names of the axes of every parameter, by its path: `block_0/attention/q_proj/kernel`."""
    flat: dict[str, Any] = flatten_dict(logical_axes(config), sep="/", is_leaf=lambda _, node: isinstance(node, P))
    return {path: tuple(spec) for path, spec in flat.items()}


def axes_of(config: ModelConfig, path: str, leaf: Any) -> Axes:
    """Those of a leaf as it is stored: a packed embedding table is its head's matrix, with the axes turned round."""
    axes = axes_by_path(config)[path]
    return axes[::-1] if is_packed(leaf) and path.startswith("embed/") else axes


def placed_leaf(config: ModelConfig, path: str, leaf: Any) -> Any:
    """One parameter, from the host, a device or several, where it belongs."""
    if active_mesh() is None:
        return jax.tree.map(jnp.asarray, leaf) if is_packed(leaf) else jnp.asarray(leaf)
    return jax.device_put(leaf, leaf_shardings(leaf, axes_of(config, path, leaf), jax.sharding.get_mesh()))


def shardings(config: ModelConfig, params: Params) -> Params:
    """The tree of `params`, whole or some of its parts, real or abstract, with a sharding for every array."""
    mesh = jax.sharding.get_mesh()
    found = lambda path, leaf: leaf_shardings(leaf, axes_of(config, _name(path), leaf), mesh)  # noqa: E731
    return jax.tree_util.tree_map_with_path(found, params, is_leaf=is_packed)


def place(config: ModelConfig, params: Params) -> Params:
    """`params` on the mesh in force."""
    return jax.device_put(params, shardings(config, params))


def place_part(config: ModelConfig, part: str, params: Params) -> Params:
    """The parameters of one part, packed or not, on the mesh in force; as they are without one."""
    return params if active_mesh() is None else place(config, {part: params})[part]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
