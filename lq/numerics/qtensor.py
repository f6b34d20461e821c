"""`QTensor`: a packed low-bit weight that takes the place of a dense leaf in a parameter tree.

Invariants, for a logical shape `[..., K, N]` (leading axes: a stack of experts):
- `planes` are uint32 `[..., words, N]`, the canonical layout of `lq_kernels.packing`;
- `scales` are `[..., groups, N]` in `spec.scale_dtype`; groups run along K, the last may be short;
- `zeros` are uint32 planes `[..., groups, words]` of `spec.bits`-bit codes packed along N, or one array
  `[..., groups, N]` in `spec.zero_dtype` where that is set; None when symmetric;
- `residual` is two `QTensor`s, the factors `[..., K, rank]` and `[..., rank, N]`, or None at rank 0;
- `spec` and `shape` are static: two tensors of equal spec and shape have equal tree structure, and a jitted function
  that takes one compiles once for both.

It is a plain pytree of arrays: it goes through jit, eval_shape, tree maps, device_put with shardings, orbax. Codes are
not differentiable; gradients flow to the inputs of a product with it.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lq.numerics.spec import QuantSpec
from lq_kernels import PackedMatrix, pack, unpack


@flax.struct.dataclass
class QTensor:
    """See the module's docstring for the invariants. Build one with `QTensor.from_codes`."""

    planes: tuple[Array, ...]
    scales: Array
    zeros: tuple[Array, ...] | Array | None
    spec: QuantSpec = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    residual: "tuple[QTensor, QTensor] | None" = None

    @classmethod
    def from_codes(
        cls,
        codes: Array,
        scales: Array,
        zeros: Array | None,
        spec: QuantSpec,
        residual: "tuple[QTensor, QTensor] | None" = None,
    ) -> "QTensor":
        """Packs.

        Args:
          codes: integers in [0, 2**bits), `[..., K, N]`.
          scales: `[..., groups, N]`; rounded to `spec.scale_dtype` here, so choose codes with the rounded ones.
          zeros: `[..., groups, N]`, integer codes in [0, 2**bits), or with a `spec.zero_dtype` numbers in
            [0, 2**bits], rounded to it here; None when `spec.symmetric`.
          residual: the packed factors of the low-rank residual, of the specs that `spec.residual` gives.

        Raises ValueError when zeros or residual are there and the spec has none, are missing, or are of another spec.
        """
        if (zeros is None) != spec.symmetric:
            raise ValueError(f"{spec} {'has no' if spec.symmetric else 'needs'} zero points")
        if (residual is None) != (spec.rank == 0):
            raise ValueError(f"{spec} {'has no' if spec.rank == 0 else 'needs a'} low-rank residual")
        shape = tuple(codes.shape)
        factors = tuple((factor.spec, factor.shape) for factor in residual or ())
        if factors != spec.residual(shape):
            got, want = (" and ".join(f"{s} {t}" for s, t in each) for each in (factors, spec.residual(shape)))
            raise ValueError(f"{spec} of shape {shape} has the factors {want}, not {got}")
        stored = zeros
        if zeros is not None and spec.zero_dtype is not None:
            stored = zeros.astype(spec.zero_dtype)
        elif zeros is not None:
            stored = tuple(p.swapaxes(-1, -2) for p in pack(zeros.swapaxes(-1, -2), spec.bits))
        return cls(pack(codes, spec.bits), scales.astype(spec.scale_dtype), stored, spec, shape, residual)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of every array in here; equal to `spec.size_bits(shape) / 8`."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)

    def codes(self) -> UInt32[Array, "... K N"]:
        return unpack(self.planes, self.spec.bits, self.shape[-2])

    def zero_points(self) -> Array | None:
        """`[..., groups, N]`: uint32 codes, or numbers of `spec.zero_dtype`; None when symmetric."""
        if not isinstance(self.zeros, tuple):
            return self.zeros
        planes = tuple(p.swapaxes(-1, -2) for p in self.zeros)
        return unpack(planes, self.spec.bits, self.shape[-1]).swapaxes(-1, -2)

    def packed(self) -> PackedMatrix:
        """The view the kernels take, of the codes: the residual is left out. Copies nothing but zero points that are
        codes, which it unpacks."""
        K = self.shape[-2]
        return PackedMatrix(
            planes=self.planes,
            scales=self.scales,
            zeros=self.zero_points(),
            zero_point=self.spec.zero_point,
            bits=self.spec.bits,
            group_size=self.spec.group_length(K),
            in_features=K,
        )

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "... K N"]:
        """The dense weight, its residual included; computed in float32, rounded once to `dtype`."""
        if self.residual is None:
            return self.packed().dequantize(dtype)
        left, right = (factor.dequantize() for factor in self.residual)
        return (self.packed().dequantize() + jnp.matmul(left, right, precision="highest")).astype(dtype)
