"""Meshes of devices by name, and the context in which models run on one."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from lq.errors import UserError
from lq.parallel.rules import AXES, RULES


def mesh_shape(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as sizes by axis, those that are not named being 1. Raises UserError for anything else."""
    found = dict.fromkeys(AXES, 1)
    named: set[str] = set()
    for item in filter(None, text.split(",")):
        name, equals, size = (part.strip() for part in item.partition("="))
        if name not in AXES or not equals or not size.isdecimal() or int(size) < 1 or name in named:
            raise UserError(f"mesh: {item!r}; write axes once, of {', '.join(AXES)}, such as data=2,tensor=4")
        named.add(name)
        found[name] = int(size)
    return found


def make_mesh(shape: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all axes of `AXES`.

    Args:
      shape: sizes by axis, or as `mesh_shape` reads them.
      devices: as many as the sizes say, all there are when None.

    Raises:
      UserError: more or fewer devices than the sizes say.
    """
    sizes = mesh_shape(shape) if isinstance(shape, str) else dict.fromkeys(AXES, 1) | dict(shape)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        written = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one device"
        raise UserError(f"mesh: {written} takes {math.prod(sizes.values())} devices, and there are {len(devices)}")
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes[name] for name in AXES), AXES, axis_types=kinds, devices=devices)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, of which shardings can be asked."""
    return AbstractMesh(tuple(sizes[name] for name in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Models that are called in here run on the mesh: weights are read onto it, rows are dealt out."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


@contextlib.contextmanager
def use_abstractly(mesh: Mesh | AbstractMesh) -> Iterator[Mesh | AbstractMesh]:
    """As `use`, for lowering alone: the devices may be a description of machines that are elsewhere."""
    described = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    with jax.sharding.use_abstract_mesh(described), nn.logical_axis_rules(RULES):
        yield mesh
