"""`SegmentedQTensor`: a packed weight whose input channels, once permuted, fall into runs of different widths.

Invariants, for a logical shape `[K, N]` and a spec that mixes it (`QuantSpec.mixes`):
- `segments` are `QTensor`s of whole runs of 128 channels, neighbours of equal width joined, one below the other;
- row i of the segments is input channel `permutation[i]`, uint16 `[K]`;
- `widths` has the width of every run of 128; their mean is `spec.bits`, so that the codes take the bits of a matrix of
  one width.

What a linear map does with it is x[..., permutation] @ segments; nothing is permuted back.
"""

import itertools
from collections.abc import Sequence
from typing import TypeGuard

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.numerics.qtensor import QTensor
from lq.numerics.spec import SEGMENT_CHANNELS, QuantSpec
from lq_kernels import SegmentedMatrix


@flax.struct.dataclass
class SegmentedQTensor:
    """See the module's docstring for the invariants. Build one with `from_segments`."""

    segments: tuple[QTensor, ...]
    permutation: Array
    spec: QuantSpec = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def from_segments(
        cls,
        permutation: Array,
        segments: Sequence[tuple[int, Array, Array, Array | None]],
        spec: QuantSpec,
        shape: tuple[int, ...],
    ) -> "SegmentedQTensor":
        """Packs.

        Args:
          permutation: `[K]`: which input channel each row of the segments is.
          segments: one below the other, width, codes, scales and zeros of each as `QTensor.from_codes` takes them.
            Together they have `spec.bits` bits a code.
          spec: a mixed spec.
          shape: `[K, N]`.
        """
        packed = tuple(
            QTensor.from_codes(codes, scales, zeros, segment_spec(spec, bits))
            for bits, codes, scales, zeros in segments
        )
        tensor = cls(packed, permutation.astype(jnp.uint16), spec, shape)
        widths = tensor.widths
        if (
            not spec.mixes(shape)
            or sum(widths) != spec.bits * len(widths)
            or len(widths) * SEGMENT_CHANNELS != shape[0]
        ):
            raise ValueError(f"{spec}: widths {widths} of a matrix {shape} are not {spec.bits} on average")
        return tensor

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every run of 128 channels."""
        return tuple(s.spec.bits for s in self.segments for _ in range(s.shape[0] // SEGMENT_CHANNELS))

    @property
    def nbytes(self) -> int:
        """Bytes of every array, a byte for the width of each run included; equal to `spec.size_bits(shape) / 8`."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self)) + len(self.widths)

    @property
    def scales(self) -> Array:
        return jnp.concatenate([segment.scales for segment in self.segments], axis=-2)

    def packed(self) -> SegmentedMatrix:
        """The view the kernels take."""
        segments = tuple(segment.packed() for segment in self.segments)
        return SegmentedMatrix(segments=segments, permutation=self.permutation.astype(jnp.int32))

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "K N"]:
        """The dense weight in the order of its input; computed in float32, rounded once to `dtype`."""
        return self.packed().dequantize(dtype)


def segment_spec(spec: QuantSpec, bits: int) -> QuantSpec:
    """The spec of a segment of `bits` in a matrix of the mixed `spec`."""
    return QuantSpec(bits=bits, group_size=spec.group_size, symmetric=spec.symmetric, scale_dtype=spec.scale_dtype)


def runs_of(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(width, first channel, stop) of every segment: neighbours of equal width joined."""
    found, first = [], 0
    for bits, run in itertools.groupby(widths):
        stop = first + SEGMENT_CHANNELS * len(list(run))
        found.append((bits, first, stop))
        first = stop
    return found


Packed = QTensor | SegmentedQTensor


def is_packed(leaf) -> TypeGuard[Packed]:
    """Whether a leaf of a parameter tree is packed, of either kind."""
    return isinstance(leaf, Packed)
