"""Weights laid out over the devices of a process for as long as they are quantized.

Output channels are quantized independently of each other given the statistics, so nothing is exchanged between devices.
What was quantized goes back to the device that the weight came from.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

Place = Callable[[jax.Array], jax.Array]
Tree = TypeVar("Tree")


def over_local_devices() -> Place:
    """`over_columns` of all devices of this process, or of all where several are one run; of one nothing is moved."""
    devices = np.asarray(jax.devices())
    return over_columns(jax.sharding.Mesh(devices, ("columns",))) if devices.size > 1 else lambda weight: weight


def over_columns(mesh: jax.sharding.Mesh) -> Place:
    """Lays weights `[..., K, N]` out over all devices of `mesh` along N, where N is a multiple of their number."""
    spec = jax.sharding.PartitionSpec

    def place(weight: jax.Array) -> jax.Array:
        axes = [None] * (weight.ndim - 1) + [mesh.axis_names if weight.shape[-1] % mesh.size == 0 else None]
        return jax.device_put(weight, jax.sharding.NamedSharding(mesh, spec(*axes)))

    return place


def beside(tree: Tree, weight: jax.Array) -> Tree:
    """Arrays that are used together with a placed weight: whole on each of its devices."""
    sharding = weight.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding) or len(sharding.device_set) == 1:
        return tree
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere), tree)


def back(packed: Tree, weight: jax.Array | np.ndarray) -> Tree:
    """What was made of a placed weight, on the device that it came from; where these were several, as it is."""
    devices = weight.devices() if isinstance(weight, jax.Array) else {jax.local_devices()[0]}
    if len(devices) > 1:
        return packed
    (device,) = devices
    spread = lambda leaf: len(leaf.sharding.device_set) > 1  # noqa: E731
    return jax.tree.map(lambda leaf: jax.device_put(leaf, device) if spread(leaf) else leaf, packed)


def like(made: Tree, model: Tree) -> Tree:
    """Dense arrays laid out as those of `model`, a tree of the same structure, where these are on several devices."""

    def laid_out(array: jax.Array, weight: jax.Array | np.ndarray) -> jax.Array:
        if not isinstance(weight, jax.Array) or len(weight.sharding.device_set) == 1:
            return array
        return jax.device_put(array, weight.sharding)

    return jax.tree.map(laid_out, made, model)
