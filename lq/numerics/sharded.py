"""Products with weights of which every device holds a part.

A weight is cut along its input channels, its output channels or its experts; a packed one so that words, scales and
zero points of a piece are those of a packed matrix again, which the kernels take as any other. `jax.shard_map` gives
each device its piece: along outputs every device has some columns of the product, along inputs a term of the sum.

Which axis of a weight lies on which axis of the mesh the rules say that are in force (`lq.parallel`); a cut that would
go through a group of channels or a word is made along the other axis, or not at all. Of a matrix whose input channels
are permuted only outputs are cut. Axes of the mesh that only store weights apart (`STORED`) are gathered for a product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lq.numerics.segmented import Packed, SegmentedQTensor, is_packed

WORD = 32  # channels: a cut there is between words in every plane
BATCH = "batch"  # the logical name of what every device has rows of
STORED = frozenset({"fsdp"})  # axes of a mesh along which weights are stored apart, and whole in a product
Axes = tuple[str | None, ...]  # the logical name of every axis of a weight, see `lq.parallel.rules`; None: never cut
Name = str | None  # of an axis of a mesh; None: not cut


@dataclasses.dataclass(frozen=True)
class Cut:
    """Axes of the mesh along which a weight `[..., K, N]` is cut."""

    inputs: Name = None
    outputs: Name = None
    experts: Name = None

    def __bool__(self):
        return any((self.inputs, self.outputs, self.experts))


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in force, None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def cut_of(w: Any, axes: Axes, mesh) -> Cut:
    """How a weight with these logical axes, dense or packed, is cut in a product; by shape and spec alone.

    Args:
      w: an array, a packed tensor, or what only has their `shape`.
      axes: logical names of its axes.
      mesh: with the rules of `lq.parallel` in force.
    """
    named = nn.logical_to_mesh_axes(axes) or (None,) * len(axes)
    wanted = [None if name in STORED or name not in mesh.shape or mesh.shape[name] == 1 else name for name in named]
    experts = wanted[0] if len(wanted) == 3 and w.shape[0] % mesh.shape.get(wanted[0], 1) == 0 else None
    inputs, outputs = wanted[-2:]
    axis = inputs or outputs
    if axis is None:
        return Cut(experts=experts)
    along = {"inputs": cuts_inputs(w, mesh.shape[axis]), "outputs": cuts_outputs(w, mesh.shape[axis])}
    for side in ("inputs", "outputs") if inputs else ("outputs", "inputs"):
        if along[side]:
            return Cut(experts=experts, **{side: axis})
    return Cut(experts=experts)


def cuts_inputs(w: Any, pieces: int) -> bool:
    """Whether `pieces` of equal numbers of input channels are whole groups and words."""
    K = w.shape[-2]
    if not is_packed(w):
        return K % pieces == 0
    if isinstance(w, SegmentedQTensor):
        return False
    return K % (pieces * math.lcm(w.spec.group_size or 1, WORD)) == 0


def cuts_outputs(w: Any, pieces: int) -> bool:
    """Whether `pieces` of equal numbers of output channels are whole words of zero points."""
    least = WORD if is_packed(w) and not w.spec.symmetric and w.spec.zero_dtype is None else 1
    return w.shape[-1] % (pieces * least) == 0


def leaf_specs(w: Any, cut: Cut) -> Any:
    """A tree of `PartitionSpec`s, one for every leaf of a weight."""
    lead = (cut.experts,) * (len(w.shape) == 3)
    if not is_packed(w):
        return P(*lead, cut.inputs, cut.outputs)
    fields: dict[str, Any]
    if isinstance(w, SegmentedQTensor):
        fields = {"segments": tuple(leaf_specs(segment, cut) for segment in w.segments), "channels": P()}
        return dataclasses.replace(w, **fields)
    whole, residual = P(*lead, cut.inputs, cut.outputs), None
    if w.residual is not None:
        left, right = w.residual
        residual = (
            leaf_specs(left, Cut(cut.inputs, None, cut.experts)),
            leaf_specs(right, Cut(None, cut.outputs, cut.experts)),
        )
    side = whole if w.spec.group_size is not None else P(*lead, None, cut.outputs)  # one group, which all pieces have
    fields = {"planes": tuple(whole for _ in w.planes), "scales": side, "residual": residual}
    fields["zeros"] = jax.tree.map(lambda _: side, w.zeros)
    return dataclasses.replace(w, **fields)


def leaf_shardings(leaf: Any, axes: Axes, mesh: Any) -> Any:
    """A tree of shardings for the arrays of one parameter, by its shape and spec: where it is stored."""
    if not is_packed(leaf) and len(leaf.shape) < 2:
        named = nn.logical_to_mesh_axes(axes) or ()
        specs = P(*(n if n in mesh.shape and leaf.shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(named)))
    else:
        specs = leaf_specs(leaf, _stored(leaf, axes, cut_of(leaf, axes, mesh), mesh))
    sharding = functools.partial(jax.sharding.NamedSharding, mesh)
    return jax.tree.map(sharding, specs, is_leaf=lambda node: isinstance(node, P))


def _stored(leaf: Any, axes: Axes, cut: Cut, mesh) -> Cut:
    """The cut of a product, and along the axes of the mesh that only store weights apart as well, where one fits."""
    for name in sorted(STORED):
        if mesh.shape.get(name, 1) == 1 or name not in (nn.logical_to_mesh_axes(axes) or ()):
            continue
        along = {"inputs": (cut.inputs, cuts_inputs), "outputs": (cut.outputs, cuts_outputs)}
        for side, (taken, fits) in sorted(along.items(), key=lambda item: item[1][0] is not None):
            if fits(leaf, mesh.shape[name] * (1 if taken is None else mesh.shape[taken])):
                both: Any = name if taken is None else (taken, name)
                return dataclasses.replace(cut, **{side: both})
    return cut


def piece(w: Any, cut: Cut, mesh) -> Any:
    """A packed weight whose leaves are those of a piece, with the shape that it has then; others as they are."""
    if not is_packed(w):
        return w
    pieces = lambda name: 1 if name is None else mesh.shape[name]  # noqa: E731
    *lead, K, N = w.shape
    lead = [count // pieces(cut.experts) for count in lead]
    shape = (*lead, K // pieces(cut.inputs), N // pieces(cut.outputs))
    if isinstance(w, SegmentedQTensor):
        return dataclasses.replace(w, segments=tuple(piece(s, cut, mesh) for s in w.segments), shape=shape)
    residual = None
    if w.residual is not None:
        left, right = w.residual
        residual = (
            piece(left, Cut(cut.inputs, None, cut.experts), mesh),
            piece(right, Cut(None, cut.outputs, cut.experts), mesh),
        )
    return dataclasses.replace(w, shape=shape, residual=residual)


def batch_axes(rows: int, mesh) -> tuple[str, ...]:
    """Axes of the mesh among which so many rows are dealt out: those of the batch, as far as they divide it."""
    named = nn.logical_to_mesh_axes((BATCH,)) or (None,)
    wanted = named[0] if isinstance(named[0], tuple) else (named[0],) if named[0] else ()
    found, pieces = [], 1
    for name in wanted:
        if name in mesh.shape and rows % (pieces * mesh.shape[name]) == 0:
            found.append(name)
            pieces *= mesh.shape[name]
    return tuple(found)


def rows_spec(shape: tuple[int, ...], axes: Axes, mesh) -> P:
    """Where an array with rows lies: rows dealt out, and `axes`, logical names, behind them.

    Of those an axis is left whole that the devices cannot share.
    """
    named = nn.logical_to_mesh_axes(axes) or ()
    fits = [n if n in mesh.shape and shape[i] % mesh.shape[n] == 0 else None for i, n in enumerate(named, 1)]
    return P(batch_axes(shape[0], mesh) or None, *fits)


def with_rows_apart(x: Float[Array, "rows ..."], *axes: str | None) -> Float[Array, "rows ..."]:
    """`x` laid out on the mesh in force, if any, as `rows_spec` says."""
    if (mesh := active_mesh()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, rows_spec(x.shape, axes, mesh))


def rows_apart(array: np.ndarray | Array) -> np.ndarray | Array:
    """An array of the host on the mesh in force, if any, its rows dealt out: what `with_rows_apart` would ask for.

    Passed to a jitted function as it is, all of it would go to every device first.
    """
    if active_mesh() is None:
        return array
    mesh = jax.sharding.get_mesh()
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, rows_spec(array.shape, (), mesh)))


def over_pieces(
    product: Callable[[Array, Packed], Array], x: Float[Array, "... in"], w: Packed, cut: Cut, mesh
) -> Float[Array, "... out"]:
    """`product(x, w)` of every device's piece, and their sum along inputs."""
    batch = (batch_axes(x.shape[0], mesh) or None,) + (None,) * (x.ndim - 2)

    def local(x, w):
        y = product(x, piece(w, cut, mesh))
        return y if cut.inputs is None else jax.lax.psum(y, cut.inputs)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(*batch, cut.inputs), leaf_specs(w, cut)),
        out_specs=P(*batch, cut.outputs),
        check_vma=False,
    )(x, w)


def to_host(array: Any) -> np.ndarray:
    """All of an array, wherever its pieces lie: of several processes all call this, and each gets the whole."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def lay_out_pieces(lay_out: Callable[..., Any], kernels: Sequence[Packed], cut: Cut, mesh) -> Any:
    """`lay_out(*kernels)` of every device's piece: a tree of arrays with one more axis in front, the pieces'."""

    def local(*kernels):
        return jax.tree.map(lambda array: array[None], lay_out(*(piece(w, cut, mesh) for w in kernels)))

    specs = tuple(leaf_specs(w, cut) for w in kernels)
    laid_out = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(cut.inputs or cut.outputs), check_vma=False)
    return jax.jit(laid_out)(*kernels)


def over_laid_out(product: Callable[[Array, Any], Any], x: Float[Array, "... in"], pieces: Any, cut: Cut) -> Any:
    """`product(x, piece)` of what `lay_out_pieces` made, and their sum along inputs; several where it gives several.

    Raises ValueError where no mesh is in force.
    """
    if (mesh := active_mesh()) is None:
        raise ValueError("a matrix in pieces is multiplied on their mesh; call this under lq.parallel.use")
    batch = (batch_axes(x.shape[0], mesh) or None,) + (None,) * (x.ndim - 2)

    def local(x, pieces):
        y = product(x, jax.tree.map(lambda array: array[0], pieces))
        return y if cut.inputs is None else jax.lax.psum(y, cut.inputs)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(*batch, cut.inputs), P(cut.inputs or cut.outputs)),
        out_specs=P(*batch, cut.outputs),
        check_vma=False,
    )(x, pieces)


def over_experts(
    product: Callable[[Array, Any, Array], Array],
    x: Float[Array, "rows in"],
    w: Any,
    rows_per_expert: Int[Array, " experts"],
    cut: Cut,
    mesh,
) -> Float[Array, "rows out"]:
    """The same for a stack of experts: every device multiplies the rows of its own, and the others' are added."""

    def local(x, w, counts):
        w = piece(w, cut, mesh)
        if cut.experts is None:
            y = product(x, w, counts)
            return y if cut.inputs is None else jax.lax.psum(y, cut.inputs)
        mine = counts.shape[0] // mesh.shape[cut.experts]
        first = jax.lax.axis_index(cut.experts) * mine
        own = jax.lax.dynamic_slice_in_dim(counts, first, mine)
        before = jnp.sum(jnp.where(jnp.arange(counts.shape[0]) < first, counts, 0))
        y = product(jnp.roll(x, -before, axis=0), w, own)
        y = jnp.where((jnp.arange(x.shape[0]) < own.sum())[:, None], y, 0)
        return jax.lax.psum(jnp.roll(y, before, axis=0), tuple(filter(None, (cut.experts, cut.inputs))))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(None, cut.inputs), leaf_specs(w, cut), P()),
        out_specs=P(None, cut.outputs),
        check_vma=False,
    )(x, w, rows_per_expert)


def over_rows(
    look_up: Callable[[Any, Array], Array], table: Any, rows: Int[Array, "..."], cut: Cut, mesh
) -> Float[Array, "... channels"]:
    """Rows of an embedding table, packed `[channels, rows]` or dense `[rows, channels]`; `cut` is of the first.

    Where rows are cut, its outputs, those of other devices are 0 in every term of a sum.
    """

    def local(table, rows):
        table = piece(table, cut, mesh)
        if cut.outputs is None:
            return look_up(table, rows)
        mine = table.shape[-1] if is_packed(table) else table.shape[0]
        at = rows - jax.lax.axis_index(cut.outputs) * mine
        found = look_up(table, jnp.clip(at, 0, mine - 1))
        return jax.lax.psum(jnp.where(((at >= 0) & (at < mine))[..., None], found, 0), cut.outputs)

    batch = (batch_axes(rows.shape[0], mesh) or None,) + (None,) * (rows.ndim - 1)
    specs = leaf_specs(table, cut) if is_packed(table) else P(cut.outputs, cut.inputs)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P(*batch)), out_specs=P(*batch, cut.inputs), check_vma=False
    )(table, rows)
