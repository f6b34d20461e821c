"""What a matmul backend is: a name, the platforms it runs on, and a handful of pure functions.

A backend that cannot serve a product returns the reason from `refuses`; the dispatcher (`dispatch.py`) takes the next.
It multiplies a matrix that was laid out for it: `prepare` does that once, at load, `restore` is its exact inverse, so
that a prepared matrix can still be served anywhere else and differentiated through.

`Problem` is everything about a product that is known before any array is: backends choose by it, tables are keyed by
it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from lq_kernels.packed import SEGMENT_CHANNELS, PackedMatrix, SegmentedMatrix
from lq_kernels.pytree import register

Config = Any  # a frozen dataclass of the backend's own


def require(config: Config, field: str, holds: bool, wanted: str) -> None:
    """For a configuration's `__post_init__`. Raises ValueError, one line, when its field is out of range."""
    if not holds:
        raise ValueError(f"{type(config).__name__}: {field}={getattr(config, field)!r}; write {wanted}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """The static facts of one run of input channels."""

    bits: int
    group_size: int
    in_features: int
    asymmetric: bool  # zeros are stored; otherwise `zero_point` holds
    zero_point: float
    scale_dtype: str
    zero_dtype: str | None

    @property
    def groups(self) -> int:
        return -(-self.in_features // self.group_size)


def uneven(segments: Sequence[Segment]) -> str | None:
    """Why segments cannot be served by a backend whose tiles have 128 channels; None when they can."""
    for i, segment in enumerate(segments[:-1]):
        if segment.in_features % SEGMENT_CHANNELS:
            return f"segment {i} of {segment.in_features} channels: needs multiples of {SEGMENT_CHANNELS} but the last"
    return None


def segment_of(w: PackedMatrix) -> Segment:
    return Segment(
        bits=w.bits,
        group_size=w.group_size,
        in_features=w.in_features,
        asymmetric=w.zeros is not None,
        zero_point=w.zero_point,
        scale_dtype=str(w.scales.dtype),
        zero_dtype=None if w.zeros is None else str(w.zeros.dtype),
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """y `[rows, out_features]` = x `[rows, in_features]` @ w, for one device kind."""

    rows: int  # or a symbolic dimension of `jax.export`
    in_features: int
    out_features: int
    x_dtype: str
    out_dtype: str
    segments: tuple[Segment, ...]
    device_kind: str | None  # as `jax.Device.device_kind` says it; None when compiling for a device that is not known
    devices: int = 1  # over which the compiler partitions the program by itself; 1 inside shard_map


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedMatrix:
    """A matrix, or several that share their input side by side, in the layout of one backend. Made by `prepare`."""

    arrays: Any  # a pytree of the backend's own
    permutation: Array | None  # int32 [K], applied to x
    backend: str
    target: str  # what it was laid out for, in the backend's words: "v5e", "sm90", ...
    segments: tuple[Segment, ...]
    in_features: int
    out_features: int
    splits: tuple[int, ...] | None = None  # output channels of each matrix, when several are one

    @property
    def nbytes(self) -> int:
        """Bytes on the device, padding and all that the backend added included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def _decode(meta: dict[str, Any]) -> dict[str, Any]:
    splits = meta["splits"]
    return meta | {
        "segments": tuple(Segment(**segment) for segment in meta["segments"]),
        "splits": None if splits is None else tuple(splits),
    }


register(
    PreparedMatrix,
    data_fields=["arrays", "permutation"],
    meta_fields=["backend", "target", "segments", "in_features", "out_features", "splits"],
    decode=_decode,
)

Matrix = PackedMatrix | SegmentedMatrix | PreparedMatrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """See the module's docstring. M, K, N: rows of x, input channels, output channels."""

    name: str
    platforms: tuple[str, ...]  # as JAX names them when lowering: "cpu", "cuda", "tpu", ...; none: any
    # One line why it can't, or None.
    refuses: Callable[[Problem], str | None]
    # The layout for a device kind (None: one that every device of the platform can use), and the one to take when a
    # matrix was not prepared and is laid out in every call; "canonical": as it is.
    target: Callable[[str | None], str]
    target_in_call: Callable[[str | None], str]
    # (segments, target) -> arrays; pure jnp, may be jitted.
    prepare: Callable[[tuple[PackedMatrix, ...], str], Any]
    # (prepared) -> segments, exactly those that were prepared.
    restore: Callable[[PreparedMatrix], tuple[PackedMatrix, ...]]
    # (x [M, K], prepared, out_dtype=, config=, interpret=) -> y [M, N], M >= 1, x already permuted.
    matmul: Callable[..., Array]
    # One line why something else is faster, or None. Asked only when no backend is forced.
    declines: Callable[[Problem], str | None] = lambda problem: None
    # The device kind taken for granted when it is not known (exporting) and the matrix was prepared for this backend,
    # or the backend is forced.
    assumes: str | None = None
    # Whether the compiler can partition the program over devices by itself. A kernel is opaque to it: it would gather
    # every operand whole.
    partitionable: bool = False
    # Whether it can be lowered for a number of rows that is known only later (export with symbolic shapes).
    symbolic_rows: bool = False
    config_type: type
    # (problem, target)
    default_config: Callable[[Problem, str], Config]
    candidates: Callable[[Problem, str], list[Config]]  # for the tuner
