"""Products with a weight that may be dense or packed. The model definition calls these and never looks inside."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import SegmentedQTensor, is_packed
from lq.numerics.sharded import Axes, Cut, active_mesh, cut_of, over_experts, over_laid_out, over_pieces, over_rows
from lq_kernels import PackedMatrix, PreparedMatrix, SegmentedMatrix, quantized_matmul

Matrix = PackedMatrix | SegmentedMatrix | PreparedMatrix  # what the kernels take


@flax.struct.dataclass
class PlusLowRank:
    """base + left @ right, each laid out for the device: what a `QTensor` with a residual is prepared to."""

    base: Matrix
    left: Matrix
    right: Matrix


@flax.struct.dataclass
class Pieces:
    """A matrix laid out for the devices of a mesh that have a piece each: every array has an axis more in front."""

    matrix: Any  # Matrix or PlusLowRank, of one piece but for that axis
    cut: Cut = flax.struct.field(pytree_node=False)


def matmul(
    x: Float[Array, "... in"],
    w: Array | QTensor | SegmentedQTensor | Matrix | PlusLowRank | Pieces,
    axes: Axes | None = None,
) -> Float[Array, "... out"]:
    """x @ w in x's dtype; a tuple of products when w was prepared of several matrices.

    `axes` are the logical names of w's axes, by which a packed w lies on the devices of the mesh in force, if any.
    """
    if isinstance(w, Pieces):
        return over_laid_out(matmul, x, w.matrix, w.cut)
    if axes is not None and is_packed(w) and (mesh := active_mesh()) is not None:
        return over_pieces(matmul, x, w, cut_of(w, axes, mesh), mesh)
    if isinstance(w, PlusLowRank):
        return matmul(x, w.base) + matmul(matmul(x, w.left), w.right)
    if isinstance(w, Matrix):
        return quantized_matmul(x, w)
    if isinstance(w, SegmentedQTensor):
        return quantized_matmul(x, w.packed())
    if isinstance(w, QTensor):
        y = quantized_matmul(x, w.packed())
        return y if w.residual is None else y + matmul(matmul(x, w.residual[0]), w.residual[1])
    return x @ w.astype(x.dtype)


def lookup(
    table: Array | QTensor | SegmentedQTensor, rows: Int[Array, "..."], axes: Axes | None = None
) -> Float[Array, "... channels"]:
    """Rows of an embedding table. A dense table is `[rows, channels]`, a packed one `[channels, rows]`: its head's
    layout.

    Groups run along the channels, so one token's vector is unpacked from its own columns alone. With `axes`, the
    logical names of rows and channels, the table lies on the devices of the mesh in force, if any.
    """
    if axes is not None and (mesh := active_mesh()) is not None:
        seen = table if is_packed(table) else jax.ShapeDtypeStruct(table.shape[::-1], jnp.float32)
        return over_rows(lookup, table, rows, cut_of(seen, axes[::-1], mesh), mesh)
    if isinstance(table, SegmentedQTensor):
        channels = jnp.concatenate([lookup(segment, rows) for segment in table.segments], axis=-1)
        return jnp.take(channels, jnp.argsort(table.permutation), axis=-1)
    if not isinstance(table, QTensor):
        return table[rows]
    if table.residual is not None:
        left, right = table.residual
        low_rank = matmul(lookup(right, rows), jnp.swapaxes(left.dequantize(), -1, -2))
        return lookup(dataclasses.replace(table, residual=None), rows) + low_rank
    take = lambda a: jnp.moveaxis(jnp.take(a, rows.ravel(), axis=-1), -1, 0)[..., None]  # noqa: E731
    packed = table.packed()
    columns = PackedMatrix(
        planes=tuple(take(p) for p in packed.planes),
        scales=take(packed.scales),
        zeros=None if packed.zeros is None else take(packed.zeros),
        zero_point=packed.zero_point,
        bits=packed.bits,
        group_size=packed.group_size,
        in_features=packed.in_features,
    )
    return columns.dequantize()[..., 0].reshape(*rows.shape, packed.in_features)


def expert_matmul(
    x: Float[Array, "rows in"],
    w: Array | QTensor,
    rows_per_expert: Int[Array, " experts"],
    axes: Axes | None = None,
) -> Float[Array, "rows out"]:
    """Row r times the matrix of its expert; rows are sorted by expert. `w` is `[experts, in, out]`, dense or packed.

    With `axes`, their logical names, it lies on the devices of the mesh in force, if any.
    """
    if axes is not None and (mesh := active_mesh()) is not None:
        return over_experts(expert_matmul, x, w, rows_per_expert, cut_of(w, axes, mesh), mesh)
    dense = w.dequantize(x.dtype) if isinstance(w, QTensor) else w.astype(x.dtype)
    return jax.lax.ragged_dot(x, dense, rows_per_expert.astype(jnp.int32))
