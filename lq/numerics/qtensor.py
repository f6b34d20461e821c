"""`QTensor`: a packed low-bit weight that takes the place of a dense leaf in a parameter tree.

Invariants, for a logical shape `[..., K, N]` (leading axes: a stack of experts):
- `planes` are uint32 `[..., words, N]`, the canonical layout of `lq_kernels.packing`;
- `scales` are `[..., groups, N]` in `spec.scale_dtype`; groups run along K, the last may be short;
- `zeros` are uint32 planes `[..., groups, words]` of `spec.bits`-bit codes packed along N; None when symmetric;
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
    zeros: tuple[Array, ...] | None
    spec: QuantSpec = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def from_codes(cls, codes: Array, scales: Array, zeros: Array | None, spec: QuantSpec) -> "QTensor":
        """Packs.

        Args:
          codes: integers in [0, 2**bits), `[..., K, N]`.
          scales: `[..., groups, N]`; rounded to `spec.scale_dtype` here, so choose codes with the rounded ones.
          zeros: integer codes `[..., groups, N]` in [0, 2**bits), or None when `spec.symmetric`.
        """
        if (zeros is None) != spec.symmetric:
            raise ValueError(f"{spec} {'has no' if spec.symmetric else 'needs'} zero points")
        packed_zeros = None
        if zeros is not None:
            packed_zeros = tuple(p.swapaxes(-1, -2) for p in pack(zeros.swapaxes(-1, -2), spec.bits))
        shape = tuple(codes.shape)
        return cls(pack(codes, spec.bits), scales.astype(spec.scale_dtype), packed_zeros, spec, shape)

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

    def zero_codes(self) -> UInt32[Array, "... groups N"] | None:
        if self.zeros is None:
            return None
        planes = tuple(p.swapaxes(-1, -2) for p in self.zeros)
        return unpack(planes, self.spec.bits, self.shape[-1]).swapaxes(-1, -2)

    def packed(self) -> PackedMatrix:
        """The view the kernels take. Copies nothing but the zero points, which it unpacks."""
        K = self.shape[-2]
        return PackedMatrix(
            planes=self.planes,
            scales=self.scales,
            zeros=self.zero_codes(),
            zero_point=self.spec.zero_point,
            bits=self.spec.bits,
            group_size=self.spec.group_length(K),
            in_features=K,
        )

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "... K N"]:
        """The dense weight; computed in float32, rounded once to `dtype`."""
        return self.packed().dequantize(dtype)
