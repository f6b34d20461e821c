"""`PackedMatrix` and `SegmentedMatrix`: what every matmul backend takes. Pytrees of arrays with static metadata.

Terms: a *group* is the run of input channels that shares one scale; a *plane* is one word array of `packing`; a
*segment* is a run of input channels with a width of its own. A `PackedMatrix` stands for the float array `[K, N]`

    w[k, n] = (code[k, n] - zero[k // group_size, n]) * scale[k // group_size, n]

The last group is shorter when K is no multiple of `group_size`. A `SegmentedMatrix` stands for its segments one below
the other, after a permutation of the input channels:

    y = sum over segments s of  x[..., permutation[start_s : start_s + K_s]] @ w_s

All but its last segment have a multiple of 32 channels, so that a cut between segments is a cut between words in every
plane. Where they have a multiple of 128 it is one between tiles too, which the backends of accelerators ask for, and
the unit of sharding along the input axis.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from lq_kernels.packing import plane_widths, unpack, words_along
from lq_kernels.pytree import register

SEGMENT_CHANNELS = 128  # what segments on accelerators are multiples of
LEAST_CHANNELS = 32  # and everywhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """One low-bit weight, canonical layout. Leading axes (a stack of experts) are allowed on every array alike."""

    planes: tuple[Array, ...]  # uint32 [..., words, N] each, as `packing.pack` returns them
    scales: Array  # float [..., groups, N]
    zeros: Array | None  # any number type [..., groups, N], within [0, 2**bits]; None: the constant `zero_point`
    zero_point: float  # used when `zeros` is None
    bits: int
    group_size: int
    in_features: int  # K

    @property
    def out_features(self) -> int:
        return self.scales.shape[-1]

    @property
    def segments(self) -> tuple["PackedMatrix", ...]:
        """Itself, as the one segment: a caller need not ask which of the two types it holds."""
        return (self,)

    @property
    def permutation(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype=jnp.float32) -> Array:
        """The float matrix `[..., K, N]`, computed in float32 and rounded once to `dtype`."""
        codes = unpack(self.planes, self.bits, self.in_features).astype(jnp.float32)
        zeros = self.zero_point if self.zeros is None else self._per_channel(self.zeros.astype(jnp.float32))
        return ((codes - zeros) * self._per_channel(self.scales.astype(jnp.float32))).astype(dtype)

    def rows(self, start: int, length: int) -> "PackedMatrix":
        """Input channels [start, start + length) as a matrix of their own. Raises ValueError where the cut is not
        between two words of every plane and two groups; the end of the matrix is such a place too."""
        stop = start + length
        for cut in (start, stop):
            if cut != self.in_features and (cut % 32 or cut % self.group_size):
                raise ValueError(f"channel {cut} is inside a word, or a group of {self.group_size}")
        widths = plane_widths(self.bits)
        words = [(words_along(start, p), words_along(stop, p)) for p in widths]
        groups = slice(start // self.group_size, math.ceil(stop / self.group_size))
        return dataclasses.replace(
            self,
            planes=tuple(plane[..., a:b, :] for plane, (a, b) in zip(self.planes, words, strict=True)),
            scales=self.scales[..., groups, :],
            zeros=None if self.zeros is None else self.zeros[..., groups, :],
            in_features=length,
        )

    def _per_channel(self, grouped: Array) -> Array:
        """`[..., groups, N]` repeated to `[..., K, N]`, the last group cut to what is left."""
        return jnp.repeat(grouped, self.group_size, axis=-2)[..., : self.in_features, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentedMatrix:
    """One weight whose input channels, once permuted, fall into segments of different widths.

    `permutation` is int32 `[K]`, or None when the layer before already emits the channels in order.
    """

    segments: tuple[PackedMatrix, ...]
    permutation: Array | None = None

    @property
    def in_features(self) -> int:
        return sum(segment.in_features for segment in self.segments)

    @property
    def out_features(self) -> int:
        return self.segments[0].out_features

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype=jnp.float32) -> Array:
        """The float matrix `[..., K, N]` in the channel order of x: the permutation is undone."""
        rows = jnp.concatenate([segment.dequantize(dtype) for segment in self.segments], axis=-2)
        return rows if self.permutation is None else jnp.take(rows, jnp.argsort(self.permutation), axis=-2)


register(PackedMatrix, ["planes", "scales", "zeros"], ["zero_point", "bits", "group_size", "in_features"])
register(SegmentedMatrix, ["segments", "permutation"], [])


def check_matrix(w: PackedMatrix | SegmentedMatrix) -> None:
    """Raises ValueError, one line, when the arrays do not fit each other or a segment is cut where none may be."""
    if not w.segments:
        raise ValueError("a segmented matrix needs at least one segment")
    for i, segment in enumerate(w.segments):
        where = "" if len(w.segments) == 1 else f"segment {i}: "
        _check_arrays(segment, where)
        if segment.out_features != w.out_features:
            raise ValueError(f"{where}{segment.out_features} output channels beside {w.out_features}")
        if i + 1 < len(w.segments) and segment.in_features % LEAST_CHANNELS:
            raise ValueError(
                f"{where}{segment.in_features} channels; every segment but the last has a multiple of {LEAST_CHANNELS}"
            )
    if w.permutation is not None and tuple(w.permutation.shape) != (w.in_features,):
        raise ValueError(f"a permutation of shape {w.permutation.shape} for {w.in_features} input channels")


def _check_arrays(w: PackedMatrix, where: str) -> None:
    """The arrays of one segment against each other and its static facts."""
    if w.scales.ndim != 2:
        raise ValueError(f"{where}expected one packed matrix, got a stack of shape {w.scales.shape[:-2]}")
    if w.group_size < 1:
        raise ValueError(f"{where}groups of {w.group_size} channels; a group has at least one")
    groups = math.ceil(w.in_features / w.group_size)
    if w.scales.shape[0] != groups:
        raise ValueError(
            f"{where}{w.in_features} channels in groups of {w.group_size} need {groups} scales, got {w.scales.shape[0]}"
        )
    if w.zeros is not None and tuple(w.zeros.shape) != tuple(w.scales.shape):
        raise ValueError(f"{where}zeros of shape {w.zeros.shape} beside scales of shape {w.scales.shape}")
    want = [(words_along(w.in_features, p), w.out_features) for p in plane_widths(w.bits)]
    got = [tuple(plane.shape) for plane in w.planes]
    if got != want or any(str(plane.dtype) != "uint32" for plane in w.planes):
        kinds = ", ".join(f"{plane.dtype}{list(plane.shape)}" for plane in w.planes)
        wanted = ", ".join(f"uint32{list(shape)}" for shape in want)
        raise ValueError(f"{where}{w.bits}-bit planes of {w.in_features} channels are {wanted}; got {kinds or 'none'}")
