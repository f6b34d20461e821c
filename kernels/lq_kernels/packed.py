"""`PackedMatrix`: what every matmul backend takes. A pytree of arrays with static metadata.

Terms: a *group* is the run of input channels that shares one scale; a *plane* is one word array of `packing`. The
matrix stands for the float array `[K, N]`

    w[k, n] = (code[k, n] - zero[k // group_size, n]) * scale[k // group_size, n]

The last group is shorter when K is no multiple of `group_size`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lq_kernels.packing import unpack


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """One low-bit weight, canonical layout. Leading axes (a stack of experts) are allowed on every array alike."""

    planes: tuple[Array, ...]  # uint32 [..., words, N] each, as `packing.pack` returns them
    scales: Array  # float [..., groups, N]
    zeros: Array | None  # any number type [..., groups, N]; None: the constant `zero_point`
    zero_point: float  # used when `zeros` is None
    bits: int
    group_size: int
    in_features: int  # K

    @property
    def out_features(self) -> int:
        return self.scales.shape[-1]

    def dequantize(self, dtype=jnp.float32) -> Array:
        """The float matrix, computed in float32 and rounded once to `dtype`."""
        codes = unpack(self.planes, self.bits, self.in_features).astype(jnp.float32)
        zeros = self.zero_point if self.zeros is None else self._per_channel(self.zeros.astype(jnp.float32))
        return ((codes - zeros) * self._per_channel(self.scales.astype(jnp.float32))).astype(dtype)

    def _per_channel(self, grouped: Array) -> Array:
        """`[..., groups, N]` repeated to `[..., K, N]`, the last group cut to what is left."""
        return jnp.repeat(grouped, self.group_size, axis=-2)[..., : self.in_features, :]


jax.tree_util.register_dataclass(
    PackedMatrix,
    data_fields=["planes", "scales", "zeros"],
    meta_fields=["zero_point", "bits", "group_size", "in_features"],
)
