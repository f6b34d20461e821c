"""Random packed matrices, and how near a product must come to float64. Shared by the tests of all backends.

Words are packed here bit by bit in NumPy from the written definition, not by the functions under test.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lq_kernels import PackedMatrix, SegmentedMatrix
from lq_kernels.reference import error_scale, reference_matmul

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def numpy_planes(codes: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """Codes `[K, N]` as uint32 words: field i of word r is code r * 32/p + i, lowest bits first."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        words = np.zeros((-(-codes.shape[0] * width // 32), codes.shape[1]), np.uint32)
        for k, row in enumerate(codes):
            field = (row.astype(np.uint32) >> np.uint32(shift)) & np.uint32(2**width - 1)
            words[k * width // 32] |= field << np.uint32(k * width % 32)
        planes.append(words)
        shift += width
    return tuple(planes)


def random_matrix(
    bits, K, N, group=128, *, asymmetric=True, seed=0, codes=None, scales=None, zeros=None, scale_dtype=np.float32
) -> PackedMatrix:
    """Uniform codes and zero points, scales around 0.02; any of them given instead."""
    rng = np.random.default_rng(seed)
    groups = -(-K // group)
    codes = rng.integers(0, 2**bits, (K, N)) if codes is None else np.broadcast_to(codes, (K, N))
    scales = rng.uniform(0.01, 0.03, (groups, N)) if scales is None else np.broadcast_to(scales, (groups, N))
    if asymmetric:
        zeros = rng.integers(0, 2**bits, (groups, N)) if zeros is None else np.broadcast_to(zeros, (groups, N))
    return PackedMatrix(
        planes=tuple(jnp.asarray(p) for p in numpy_planes(codes, bits)),
        scales=jnp.asarray(scales.astype(scale_dtype)),
        zeros=jnp.asarray(zeros.astype(np.uint32)) if asymmetric else None,
        zero_point=float(2 ** (bits - 1)) if bits > 1 else 0.5,
        bits=bits,
        group_size=group,
        in_features=K,
    )


def random_segments(widths, lengths, N, group=128, *, permuted=True, seed=0, **options) -> SegmentedMatrix:
    parts = [
        random_matrix(b, k, N, min(group, k), seed=seed + i, **options)
        for i, (b, k) in enumerate(zip(widths, lengths, strict=True))
    ]
    order = np.random.default_rng(seed + 99).permutation(sum(lengths)).astype(np.int32)
    return SegmentedMatrix(segments=tuple(parts), permutation=jnp.asarray(order) if permuted else None)


def random_rows(M, K, dtype=jnp.float32, *, seed=7, mean=0.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((M, K)) + mean, dtype)


def assert_product(y, x, w, *, rounds_weights=False, scale=4e-6) -> None:
    """y is x @ w to the accuracy of exact integers, float32 sums and one rounding to y's dtype.

    `scale` is relative to |x| @ |w|; a backend that rounds weights to x's dtype is allowed that rounding.
    """
    want, size = reference_matmul(x, w), error_scale(x, w)
    got = np.asarray(y).astype(np.float64)
    assert got.shape == want.shape
    bound = scale * size + 1e-30
    if np.asarray(y).dtype != np.float32:
        # One rounding to nearest is half an eps of the value it rounds, which is itself off by no more than the bound.
        bound = bound + 0.51 * float(ml_dtypes.finfo(np.asarray(y).dtype).eps) * (np.abs(want) + bound)
    if rounds_weights and x.dtype != jnp.float32:
        bound = bound + 0.51 * float(ml_dtypes.finfo(np.asarray(x).dtype).eps) * size
    worst = np.max(np.abs(got - want) / bound) if got.size else 0.0
    assert worst <= 1.0, f"error is {worst:.3g} times the bound"
