"""Packed low-bit matrices and the products with them. Depends on jax and numpy only."""

from lq_kernels.matmul import BACKENDS, quantized_matmul
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import pack, packed_bits, plane_widths, unpack, words_along

__all__ = [
    "BACKENDS",
    "PackedMatrix",
    "pack",
    "packed_bits",
    "plane_widths",
    "quantized_matmul",
    "unpack",
    "words_along",
]
