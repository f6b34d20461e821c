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
    """See the module's docstring for the invariants. Build one with `from_runs`."""

    segments: tuple[QTensor, ...]
    permutation: Array
    spec: QuantSpec = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def from_runs(
        cls,
        codes: Array,
        scales: Array,
        zeros: Array | None,
        permutation: Array,
        widths: Sequence[int],
        spec: QuantSpec,
    ) -> "SegmentedQTensor":
        """Packs.

        Args:
          codes: integers `[K, N]` in the permuted order, within the width of their run.
          scales: `[groups, N]`, of the permuted channels.
          zeros: codes `[groups, N]` within the width of their run; None when `spec.symmetric`.
          permutation: `[K]`: which input channel each row is.
          widths: of every run of 128 channels; their mean is `spec.bits`.
          spec: a mixed spec.
        """
        shape = tuple(codes.shape)
        if not spec.mixes(shape) or sum(widths) != spec.bits * len(widths):
            raise ValueError(f"{spec}: widths {tuple(widths)} of a matrix {shape} are not {spec.bits} on average")
        segments = []
        for bits, first, stop in runs_of(widths):
            groups = slice(first // spec.group_length(shape[0]), stop // spec.group_length(shape[0]))
            segment_zeros = None if zeros is None else zeros[groups]
            segments.append(
                QTensor.from_codes(codes[first:stop], scales[groups], segment_zeros, segment_spec(spec, bits))
            )
        return cls(tuple(segments), permutation.astype(jnp.uint16), spec, shape)

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
