"""The product in float64 NumPy, written out from the definition: what every backend is held against.

It shares no code with the packing or the backends. `error_scale` is the matrix of magnitudes that rounding errors are
proportional to: an exact-integer kernel that accumulates in float32 stays within 4e-6 of it.
"""

import numpy as np

from lq_kernels.packed import PackedMatrix, SegmentedMatrix

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def reference_matmul(x, w: PackedMatrix | SegmentedMatrix) -> np.ndarray:
    """x `[..., K]` @ w as float64 `[..., N]`."""
    with np.errstate(invalid="ignore"):
        return _permuted(x, w) @ reference_weights(w)


def error_scale(x, w: PackedMatrix | SegmentedMatrix) -> np.ndarray:
    """|x| @ |w| as float64 `[..., N]`."""
    with np.errstate(invalid="ignore"):
        return np.abs(_permuted(x, w)) @ np.abs(reference_weights(w))


def reference_weights(w: PackedMatrix | SegmentedMatrix) -> np.ndarray:
    """The float64 matrix `[K, N]`, input channels in the order of the segments."""
    return np.concatenate([_segment(segment) for segment in w.segments])


def _permuted(x, w) -> np.ndarray:
    x = np.asarray(x).astype(np.float64)
    return x if w.permutation is None else x[..., np.asarray(w.permutation)]


def _segment(w: PackedMatrix) -> np.ndarray:
    K, group = w.in_features, np.arange(w.in_features) // w.group_size
    codes, shift = np.zeros((K, w.out_features), np.int64), 0
    for plane, width in zip(w.planes, PLANES[w.bits], strict=True):
        words = np.asarray(plane).astype(np.int64)
        for k in range(K):
            field = words[k * width // 32] >> (k * width % 32) & (2**width - 1)
            codes[k] |= field << shift
        shift += width
    zeros = w.zero_point if w.zeros is None else np.asarray(w.zeros).astype(np.float64)[group]
    return (codes - zeros) * np.asarray(w.scales).astype(np.float64)[group]
