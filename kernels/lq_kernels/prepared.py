"""`prepare`: the one-time relayout of a matrix for the backend that will multiply it, and the way back."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lq_kernels import devices
from lq_kernels.backend import Backend, Matrix, PreparedMatrix, Segment, segment_of
from lq_kernels.dispatch import choose, forced_backend, problem_of
from lq_kernels.packed import PackedMatrix, SegmentedMatrix, check_matrix
from lq_kernels.packing import plane_widths, words_along
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
    if any(not isinstance(each, PackedMatrix | SegmentedMatrix) for each in (w if several else [w])):
        raise ValueError("prepare takes packed or segmented matrices, and none that is prepared already")
    if device_kind and not platform and not backend:
        raise ValueError(f"device_kind {device_kind!r} without its platform; give platform too, as in platform='tpu'")
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
    target = chosen.target(device_kind) if 0 not in (whole.in_features, whole.out_features) else "canonical"
    if target == "canonical" and not several:
        return w
    return lay_out(whole, chosen, target, splits)


def check_prepared(w: PreparedMatrix) -> None:
    """Raises ValueError when the arrays are not those of one matrix of so many channels, but of several parts."""
    got = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(w.arrays))
    if got != _shapes(w.backend, w.target, w.segments, w.out_features):
        raise ValueError(
            f"the arrays are not those of a prepared matrix [{w.in_features}, {w.out_features}]; one that was prepared "
            "inside jax.shard_map is multiplied inside jax.shard_map"
        )


@functools.lru_cache(maxsize=4096)
def _shapes(backend: str, target: str, segments: tuple[Segment, ...], out_features: int) -> tuple[tuple[int, ...], ...]:
    """Of the arrays of a matrix laid out."""

    def empty(s: Segment) -> PackedMatrix:
        array = lambda rows, dtype: jnp.zeros((rows, out_features), dtype)  # noqa: E731
        return PackedMatrix(
            planes=tuple(array(words_along(s.in_features, width), jnp.uint32) for width in plane_widths(s.bits)),
            scales=array(s.groups, s.scale_dtype),
            zeros=None if s.zero_dtype is None else array(s.groups, s.zero_dtype),
            zero_point=s.zero_point,
            bits=s.bits,
            group_size=s.group_size,
            in_features=s.in_features,
        )

    laid_out = jax.eval_shape(lambda: _relayout(backend, target)(tuple(empty(s) for s in segments)))
    return tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(laid_out))


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

    Raises ValueError when their segments differ in anything but the output channels, or their permutations differ;
    while a program is traced, permutations are the same when they are the same array.
    """
    first = matrices[0]
    for i, other in enumerate(matrices[1:], start=1):
        if [segment_of(s) for s in other.segments] != [segment_of(s) for s in first.segments]:
            raise ValueError(
                f"matrix {i} differs from the first in width, group, dtype or segments; prepare each by itself"
            )
        if not _same(other.permutation, first.permutation):
            raise ValueError(f"matrix {i} has another permutation of the input; prepare each by itself")
    joined = [
        jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-1), *segments)
        for segments in zip(*[m.segments for m in matrices], strict=True)
    ]
    if isinstance(first, PackedMatrix):
        return joined[0]
    return SegmentedMatrix(segments=tuple(joined), permutation=first.permutation)


def _same(a, b) -> bool:
    if a is b or a is None or b is None or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    return bool(jnp.array_equal(a, b))


@functools.cache
def _relayout(backend: str, target: str):
    """Jitted, so that what the relayout needs in between is freed at once. One per backend and target."""
    prepare_for = load_backend(backend).prepare
    return jax.jit(lambda segments: prepare_for(segments, target))
