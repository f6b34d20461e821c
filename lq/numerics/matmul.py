"""Products with a weight that may be dense or packed. The model definition calls these and never looks inside."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lq.numerics.qtensor import QTensor
from lq_kernels import PackedMatrix, PreparedMatrix, quantized_matmul


def matmul(x: Float[Array, "... in"], w: Array | QTensor | PackedMatrix | PreparedMatrix) -> Float[Array, "... out"]:
    """x @ w in x's dtype; a tuple of products when w was prepared of several matrices."""
    if isinstance(w, PackedMatrix | PreparedMatrix):
        return quantized_matmul(x, w)
    if isinstance(w, QTensor):
        return quantized_matmul(x, w.packed())
    return x @ w.astype(x.dtype)


def lookup(table: Array | QTensor, rows: Int[Array, "..."]) -> Float[Array, "... channels"]:
    """Rows of an embedding table. A dense table is `[rows, channels]`, a packed one `[channels, rows]`: its head's
    layout.

    Groups run along the channels, so one token's vector is unpacked from its own columns alone.
    """
    if not isinstance(table, QTensor):
        return table[rows]
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
