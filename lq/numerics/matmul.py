"""Products with a weight that may be dense or packed. The model definition calls these and never looks inside."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import SegmentedQTensor
from lq_kernels import PackedMatrix, PreparedMatrix, SegmentedMatrix, quantized_matmul

Matrix = PackedMatrix | SegmentedMatrix | PreparedMatrix  # what the kernels take


@flax.struct.dataclass
class PlusLowRank:
    """base + left @ right, each laid out for the device: what a `QTensor` with a residual is prepared to."""

    base: Matrix
    left: Matrix
    right: Matrix


def matmul(
    x: Float[Array, "... in"], w: Array | QTensor | SegmentedQTensor | Matrix | PlusLowRank
) -> Float[Array, "... out"]:
    """x @ w in x's dtype; a tuple of products when w was prepared of several matrices."""
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


def lookup(table: Array | QTensor | SegmentedQTensor, rows: Int[Array, "..."]) -> Float[Array, "... channels"]:
    """Rows of an embedding table. A dense table is `[rows, channels]`, a packed one `[channels, rows]`: its head's
    layout.

    Groups run along the channels, so one token's vector is unpacked from its own columns alone.
    """
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
    x: Float[Array, "rows in"], w: Array | QTensor, rows_per_expert: Int[Array, " experts"]
) -> Float[Array, "rows out"]:
    """Row r times the matrix of its expert; rows are sorted by expert. `w` is `[experts, in, out]`, dense or packed."""
    dense = w.dequantize(x.dtype) if isinstance(w, QTensor) else w.astype(x.dtype)
    return jax.lax.ragged_dot(x, dense, rows_per_expert.astype(jnp.int32))
