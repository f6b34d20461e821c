"""`SegmentedQTensor`: a packed weight whose input channels are permuted, in runs of one width or several.

Invariants, for a logical shape `[K, N]` and a spec that mixes it (`QuantSpec.mixes`) or orders it (`QuantSpec.orders`):
- `segments` are `QTensor`s of whole runs, neighbours of equal width joined, one below the other;
- a run has 128 channels where the spec is mixed, and K over the number of widths where they are given, one otherwise;
- `widths` has the width of every run; of a mixed spec their mean is `spec.bits`, so that the codes take the bits of a
  matrix of one width;
- row i of the segments is input channel `permutation[i]`. Of a mixed spec that is stored, uint16 `[K]`; where groups
  are by energy, only the group that every channel is in is, uint8 `[K]`, uint16 beyond 256 groups: within a group
  channels keep their order.

What a linear map does with it is x[..., permutation] @ segments; nothing is permuted back.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard

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
    channels: Array  # [K]: the permutation, uint16, or the group of every channel, uint8 or uint16
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
          permutation: `[K]`: which input channel each row of the segments is; ascending within each group where groups
            are by energy.
          segments: one below the other, width, codes, scales and zeros of each as `QTensor.from_codes` takes them.
            Their widths are those that the spec gives, or `spec.bits` a code on average.
          spec: one that mixes or orders the shape.
          shape: `[K, N]`.
        """
        packed = tuple(
            QTensor.from_codes(codes, scales, zeros, spec.segment(bits)) for bits, codes, scales, zeros in segments
        )
        if spec.mixed:
            channels = permutation.astype(jnp.uint16)
        else:
            dtype = jnp.dtype(f"uint{spec.channel_bits(shape[0])}")
            group = (jnp.arange(shape[0]) // spec.group_length(shape[0])).astype(dtype)
            channels = jnp.zeros(shape[0], dtype).at[permutation].set(group)
        tensor = cls(packed, channels, spec, shape)
        check_widths(tensor.widths, spec, shape)
        return tensor

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def permutation(self) -> Array:
        """Which input channel each row of the segments is, int32 `[K]`."""
        if self.spec.mixed:
            return self.channels.astype(jnp.int32)
        return jnp.argsort(self.channels, stable=True).astype(jnp.int32)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every run."""
        length = run_channels(self.spec, self.shape[0])
        return tuple(s.spec.bits for s in self.segments for _ in range(s.shape[0] // length))

    @property
    def nbytes(self) -> int:
        """Bytes of every array, a byte for the width of each mixed run included; `spec.size_bits(shape) / 8`."""
        arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))
        return arrays + (len(self.widths) if self.spec.mixed else 0)

    @property
    def scales(self) -> Array:
        return jnp.concatenate([segment.scales for segment in self.segments], axis=-2)

    def packed(self) -> SegmentedMatrix:
        """The view the kernels take."""
        segments = tuple(segment.packed() for segment in self.segments)
        return SegmentedMatrix(segments=segments, permutation=self.permutation)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "K N"]:
        """The dense weight in the order of its input; computed in float32, rounded once to `dtype`."""
        return self.packed().dequantize(dtype)


def run_channels(spec: QuantSpec, in_features: int) -> int:
    """Input channels of a run."""
    return SEGMENT_CHANNELS if spec.mixed else in_features // len(spec.widths or (spec.bits,))


def check_widths(widths: Sequence[int], spec: QuantSpec, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless runs of these widths are a matrix of that spec and shape."""
    if not spec.mixed:
        given = spec.widths or (spec.bits,)
        fits = spec.orders(shape) and spec.segmentable(shape, len(given)) and tuple(widths) == given
    else:
        whole = len(widths) * SEGMENT_CHANNELS == shape[0]
        fits = spec.mixes(shape) and whole and sum(widths) == spec.bits * len(widths)
    if not fits or not all(1 <= width <= 8 for width in widths):
        raise ValueError(f"{spec}: widths {list(widths)} of a matrix {list(shape)} are not those of the spec")


def runs_of(widths: Sequence[int], length: int = SEGMENT_CHANNELS) -> list[tuple[int, int, int]]:
    """(width, first channel, stop) of every segment of runs of `length`: neighbours of equal width joined."""
    found, first = [], 0
    for bits, run in itertools.groupby(widths):
        stop = first + length * len(list(run))
        found.append((bits, first, stop))
        first = stop
    return found


Packed = QTensor | SegmentedQTensor


def is_packed(leaf) -> TypeGuard[Packed]:
    """Whether a leaf of a parameter tree is packed, of either kind."""
    return isinstance(leaf, Packed)


def abstract_packed(spec: QuantSpec, shape: tuple[int, ...], widths: Sequence[int] | None = None) -> Packed:
    """A packed weight of `jax.ShapeDtypeStruct`s: what its arrays are, and none of them.

    Runs that are mixed have the `widths`, a width for each, or when None those of the spec; where it leaves them to the
    weights, equal ones, which have as many bytes in all.
    """

    def side(K: int, dtype: Any) -> Array:
        return jnp.zeros((*shape[:-2], spec.num_groups(K), shape[-1]), dtype)

    def arrays(K: int) -> tuple[Array, Array, Array | None]:
        zeros = None if spec.symmetric else side(K, spec.zero_dtype or jnp.uint32)
        return jnp.zeros((*shape[:-2], K, shape[-1]), jnp.uint32), side(K, jnp.float32), zeros

    def build() -> Packed:
        K = shape[-2]
        if not (spec.mixes(shape) or spec.orders(shape)):
            factors = [abstract_packed(*factor) for factor in spec.residual(shape)]
            residual: Any = tuple(_zeros_like(factor) for factor in factors) or None
            plain = dataclasses.replace(spec, mixed=False, by_energy=False)
            return QTensor.from_codes(*arrays(K), plain, residual)
        equal = (spec.bits,) * (K // run_channels(spec, K))
        runs = runs_of(widths or spec.widths or equal, run_channels(spec, K))
        segments = [(bits, *arrays(stop - first)) for bits, first, stop in runs]
        return SegmentedQTensor.from_segments(jnp.arange(K), segments, spec, shape)

    return jax.eval_shape(build)


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
