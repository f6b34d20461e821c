"""`prepare`: the one-time relayout of a matrix for the backend that will multiply it, and the way back."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lq_kernels import devices
from lq_kernels.backend import Backend, Matrix, PreparedMatrix, segment_of
from lq_kernels.dispatch import choose, forced_backend, problem_of
from lq_kernels.packed import PackedMatrix, SegmentedMatrix, check_matrix
from lq_kernels.registry import load_backend


def prepare(
    w: PackedMatrix | SegmentedMatrix | Sequence[PackedMatrix | SegmentedMatrix],
    *,
    backend: str | None = None,
    platform: str | None = None,
    device_kind: str | None = None,
) -> Matrix:
    """Lays `w` out for one backend, once, at load.

    Args:
      w: a matrix, or several that share the input channels and have equal widths, groups and permutation (query, key
        and value projections, gate and up): these become one matrix whose product is a tuple.
      backend: by name; None: what serves one row of bfloat16 on `platform`.
      platform, device_kind: where it will run; the default device's when None.

    Returns:
      A `PreparedMatrix`; its `nbytes` are the bytes on the device. `w` itself when it is a single matrix and the
      backend takes the canonical layout as it is.

    Raises:
      ValueError: several matrices that cannot be one; no backend or platform of that name.
      NotImplementedError: the named backend cannot serve the matrix.
    """
    several = isinstance(w, Sequence)
    if several and not w:
        raise ValueError("prepare got an empty sequence; give at least one matrix")
    splits = tuple(each.out_features for each in w) if several else None
    whole = side_by_side(w) if several else w
    check_matrix(whole)
    platform = devices.known_platform(platform)
    device_kind = device_kind or devices.device_kind(platform)
    problem = problem_of(1, jnp.bfloat16, whole, jnp.bfloat16, device_kind)
    choice = choose(problem, platform, whole, forced=backend or forced_backend(), interpret=backend is not None)
    chosen = load_backend(choice.backend)
    target = chosen.target(device_kind)
    if target == "canonical" and not several:
        return w
    return lay_out(whole, chosen, target, splits)


def lay_out(w: PackedMatrix | SegmentedMatrix, backend: Backend, target: str, splits=None) -> PreparedMatrix:
    """`w` in the layout `target` of `backend`."""
    return PreparedMatrix(
        arrays=_relayout(backend.name, target)(w.segments),
        permutation=w.permutation,
        backend=backend.name,
        target=target,
        segments=tuple(segment_of(segment) for segment in w.segments),
        in_features=w.in_features,
        out_features=w.out_features,
        splits=splits,
    )


def unprepared(w: Matrix) -> PackedMatrix | SegmentedMatrix:
    """The canonical matrix; exactly the one that was prepared. Several prepared as one stay one, side by side."""
    if not isinstance(w, PreparedMatrix):
        return w
    segments = load_backend(w.backend).restore(w)
    if len(segments) == 1 and w.permutation is None:
        return segments[0]
    return SegmentedMatrix(segments=tuple(segments), permutation=w.permutation)


def side_by_side(matrices: Sequence[PackedMatrix | SegmentedMatrix]) -> PackedMatrix | SegmentedMatrix:
    """Matrices that share their input as one, output channels one after the other.

    Raises ValueError when their segments differ in anything but the output channels, or a permutation is not the very
    same array.
    """
    first = matrices[0]
    for i, other in enumerate(matrices[1:], start=1):
        if [segment_of(s) for s in other.segments] != [segment_of(s) for s in first.segments]:
            raise ValueError(
                f"matrix {i} differs from the first in width, group, dtype or segments; prepare each by itself"
            )
        if other.permutation is not first.permutation:
            raise ValueError(f"matrix {i} has another permutation of the input; prepare each by itself")
    joined = [
        jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-1), *segments)
        for segments in zip(*[m.segments for m in matrices], strict=True)
    ]
    if isinstance(first, PackedMatrix):
        return joined[0]
    return SegmentedMatrix(segments=tuple(joined), permutation=first.permutation)


@functools.cache
def _relayout(backend: str, target: str):
    """Jitted, so that what the relayout needs in between is freed at once. One per backend and target."""
    prepare_for = load_backend(backend).prepare
    return jax.jit(lambda segments: prepare_for(segments, target))
