"""Parameters on many devices, dense or packed, written by Orbax: every process writes the pieces that it has.

A checkpoint of lq (`write_quantized`) is for keeping and for every command, and one process writes it. This is for a
program that runs on a mesh and goes on later, on another one if need be:

    save_sharded("state", params)
    with use(make_mesh("tensor=4")):
        params = restore_sharded("state", config)

In the directory are `arrays`, one for every array of the tree by its path, and `leaves`, JSON: what makes packed
tensors of them again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.layout import axes_by_path, shardings
from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import SegmentedQTensor, abstract_packed
from lq.numerics.sharded import active_mesh
from lq.numerics.spec import QuantSpec
from lq.sealed import sealed, unsealed


def save_sharded(directory: str | Path, params: Params) -> None:
    """Writes parameters, wherever their pieces lie. Of several processes all call this.

    Args:
      directory: a new one; it is there whole or not at all. On several hosts, where all can write.
      params: dense or packed, as `lq.load`, `lq.quantize` and `lq.parallel.place` give them, not prepared.

    Raises:
      UserError: the directory is there already, or parameters that `lq.prepare` has laid out for a device.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise UserError(f"{directory}: already there; give a new directory")
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    described = {path: _described(path, leaf) for path, leaf in leaves.items()}
    import orbax.checkpoint as ocp

    items = {"arrays": ocp.args.StandardSave(_arrays(params)), "leaves": ocp.args.JsonSave(sealed(described))}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.Composite(**items))


def restore_sharded(directory: str | Path, config: ModelConfig) -> Params:
    """Reads what `save_sharded` wrote onto the mesh in force, which may be another, or the default device.

    Every device is given its pieces alone. Raises UserError for what is no such directory, and for one of another
    model.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    if not (directory / "leaves").is_dir() or not (directory / "arrays").is_dir():
        raise UserError(f"{directory}: no parameters written by lq.parallel.save_sharded")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(directory, args=ocp.args.Composite(leaves=ocp.args.JsonRestore()))["leaves"]
        abstract = _abstract(directory, found, config)
        wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(_arrays(abstract)))
        arrays = checkpointer.restore(directory, args=wanted)["arrays"]
    structure = jax.tree.structure(abstract)
    return jax.tree.unflatten(structure, [arrays[name] for name in _arrays(abstract)])


def _described(path: str, leaf: Any) -> dict[str, Any]:
    """What a leaf is, as JSON: of a packed one all that is not in its arrays."""
    if isinstance(leaf, SegmentedQTensor):
        return {"spec": leaf.spec.to_dict(), "shape": leaf.shape, "widths": leaf.widths}
    if isinstance(leaf, QTensor):
        return {"spec": leaf.spec.to_dict(), "shape": leaf.shape}
    if not isinstance(leaf, jax.Array):
        raise UserError(f"{path}: laid out for a device; save the parameters that lq.prepare was given")
    return {"dtype": leaf.dtype.name, "shape": leaf.shape}


def _abstract(directory: Path, described: Any, config: ModelConfig) -> Params:
    """The tree that was saved, of shapes, dtypes, and where each array belongs now."""
    try:
        leaves = {path: _leaf(fields) for path, fields in unsealed(described).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: the checksum's and UserError too
        raise UserError(f"{directory}: damaged ({error}); save the parameters again") from None
    expected = axes_by_path(config)
    for path in sorted(leaves.keys() ^ expected.keys()):
        which = "is missing" if path in expected else "is none of its parameters"
        raise UserError(f"{directory}: of another model than the config, {path} {which}")
    tree = unflatten_dict(leaves, sep="/")
    if active_mesh() is None:
        where: Any = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)
    else:
        where = shardings(config, tree)
    return jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), tree, where)


def _leaf(fields: Mapping[str, Any]) -> Any:
    shape = tuple(fields["shape"])
    if "dtype" in fields:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(fields["dtype"]))
    return abstract_packed(QuantSpec.from_dict(fields["spec"]), shape, fields.get("widths"))


def _arrays(params: Params) -> dict[str, Any]:
    """Every array of a tree, packed tensors taken apart, by its path; in the order in which the tree has them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in flat}
