"""Packed low-bit matrices and the products with them. Depends on jax and numpy only."""

from lq_kernels.backend import PreparedMatrix
from lq_kernels.cpu.library import library
from lq_kernels.matmul import explain, quantized_matmul
from lq_kernels.packed import PackedMatrix, SegmentedMatrix
from lq_kernels.packing import pack, packed_bits, plane_widths, unpack, words_along
from lq_kernels.prepared import prepare, unprepared
from lq_kernels.reference import reference_matmul
from lq_kernels.registry import backend_names, export_checks

library()  # makes the C++ kernels known to XLA: a program exported with them may be the first to ask for one

__all__ = [
    "PackedMatrix",
    "PreparedMatrix",
    "SegmentedMatrix",
    "backend_names",
    "explain",
    "export_checks",
    "pack",
    "packed_bits",
    "plane_widths",
    "prepare",
    "quantized_matmul",
    "reference_matmul",
    "unpack",
    "unprepared",
    "words_along",
]
