"""`QuantSpec`: how the weights of one matrix are stored, and what that costs to the bit.

A weight `[K, N]` (input, output channels) is cut along K into groups; each group of each output channel has one scale
and, when asymmetric, one zero point:

    w[k, n] ~ (code[k, n] - zero[g, n]) * scale[g, n] + sum_r left[k, r] * right[r, n],     g = k // group_size

A zero point is a code of the same width, or a number of `zero_dtype`, fractions included (HQQ's). The sum is a
low-rank residual (LoRC, arXiv 2303.08302), there when `rank` is above zero; its factors are themselves packed, in 8
bits. A `mixed` matrix has widths of its own for every run of 128 input channels, `bits` on average, after a permutation
of the channels (`lq.numerics.segmented`); one that cannot be cut so is not mixed.

`by_energy`, the groups are not of neighbours: the first has the channels of most energy, and so on, and the group of
every channel is stored. So a quantizer that rounds channels in that order, GPTQ with act-order, meets every group
whole. A matrix without several whole groups keeps those of neighbours. With `widths` a plan gives widths to such
groups: the channels, those of most energy first, are cut into as many segments of equal length.

Sizes counted here are sizes on disk and on the device: codes in whole uint32 words (`lq_kernels.packing`), scales in
their dtype, zero points as codes packed along the output axis or in their dtype, the factors of the residual with their
scales. Nothing is rounded or left out, so that a plan's bits per weight equal what the finished checkpoint measures.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

from lq.errors import UserError

SCALE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
GROUP_SIZES = (32, 64, 128, 256)
SEGMENT_CHANNELS = 128  # input channels of a mixed matrix that share a width; those of `lq_kernels`
PERMUTATION_BITS, WIDTH_BITS = 16, 8  # stored per channel and per run of a mixed matrix
MOST_SEGMENTS = 256  # of a matrix whose plan gives widths
LEAST_SEGMENT = 32  # channels: what any width packs into whole words


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class QuantSpec:
    """Number format of one matrix. Hashable: the static part of a `QTensor`.

    Raises `UserError` for a width outside 1..8, an unknown group size or dtype, or a value of another type.
    """

    bits: int
    group_size: int | None = 128  # input channels per scale; None: the whole column
    symmetric: bool = False  # the zero point is the middle code, and not stored
    scale_dtype: str = "bfloat16"
    format: Literal["int"] = "int"
    zero_dtype: str | None = None  # of zero points that need not be whole; None: they are codes of `bits` bits
    rank: int = 0  # of the low-rank residual, 0: none
    mixed: bool = False  # runs of 128 input channels have widths of their own, `bits` on average
    by_energy: bool = False  # groups of channels in the order of their energy, not of neighbours
    # Of the segments of the input channels, most energy first; `bits` is the largest of them. None: one width.
    widths: tuple[int, ...] | None = None

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in range(1, 9):
            raise UserError(f"bits: {self.bits!r} is not a width lq can store; write a whole number from 1 to 8")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size not in GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UserError(f"group_size: {self.group_size!r}; write one of {sizes}, or null for the whole column")
        if not isinstance(self.symmetric, bool):
            raise UserError(f"symmetric: {self.symmetric!r}; write true or false")
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_BITS:
            raise UserError(f"scale_dtype: {self.scale_dtype!r}; write one of {', '.join(SCALE_BITS)}")
        if self.format != "int":
            raise UserError(f"format: {self.format!r}; write int")
        if self.zero_dtype is not None and (not isinstance(self.zero_dtype, str) or self.zero_dtype not in SCALE_BITS):
            raise UserError(f"zero_dtype: {self.zero_dtype!r}; write one of {', '.join(SCALE_BITS)}, or null for codes")
        if self.zero_dtype is not None and self.symmetric:
            raise UserError(f"zero_dtype: {self.zero_dtype}, but symmetric codes store no zero points; leave one out")
        if type(self.rank) is not int or self.rank < 0:
            raise UserError(f"rank: {self.rank!r}; write a whole number, 0 for no low-rank residual")
        if not isinstance(self.mixed, bool):
            raise UserError(f"mixed: {self.mixed!r}; write true or false")
        if self.mixed and (self.rank or self.zero_dtype is not None):
            what = "rank" if self.rank else "zero_dtype"
            raise UserError(f"mixed: widths of its own for every run of channels do not go with {what}; leave one out")
        if self.mixed and (self.group_size is None or SEGMENT_CHANNELS % self.group_size):
            raise UserError(
                f"mixed: runs of {SEGMENT_CHANNELS} channels hold no whole group; write group_size 32, 64 or 128"
            )
        if not isinstance(self.by_energy, bool):
            raise UserError(f"by_energy: {self.by_energy!r}; write true or false")
        if self.widths is not None:
            self._check_widths()
        if self.ordered:
            self._check_order("by_energy" if self.by_energy else "widths")

    def _check_widths(self):
        widths = self.widths or ()
        if not isinstance(self.widths, tuple) or any(type(b) is not int or b not in range(1, 9) for b in widths):
            raise UserError(f"widths: {self.widths!r}; write whole numbers from 1 to 8, such as (4, 3, 2, 2)")
        if not 2 <= len(widths) <= MOST_SEGMENTS or self.bits != max(widths):
            raise UserError(
                f"widths: {widths} and bits {self.bits}; write 2 to 256 widths, and bits the largest of them"
            )
        if self.by_energy:
            raise UserError("widths: segments are by energy in any case; leave out by_energy")

    def _check_order(self, field: str):
        for name in ("rank", "zero_dtype", "mixed"):
            if getattr(self, name):
                raise UserError(f"{field}: groups of channels by their energy do not go with {name}; leave one out")
        if self.group_size is None:
            raise UserError(f"{field}: a column is one group, without an order; write a group_size, such as 64")

    @property
    def ordered(self) -> bool:
        """Whether groups are of channels in the order of their energy, in a matrix where they can be."""
        return self.by_energy or self.widths is not None

    @property
    def code_bits(self) -> float:
        """The mean width of the codes."""
        return self.bits if self.widths is None else sum(self.widths) / len(self.widths)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def zero_point(self) -> float:
        """The constant zero point of a symmetric spec: the middle code; half-way between the two codes at one bit."""
        return float(1 << (self.bits - 1)) if self.bits > 1 else 0.5

    def group_length(self, in_features: int) -> int:
        """Channels in a full group of a matrix with `in_features` inputs."""
        return in_features if self.group_size is None else self.group_size

    def num_groups(self, in_features: int) -> int:
        return math.ceil(in_features / self.group_length(in_features))

    def size_bits(self, shape: tuple[int, ...]) -> int:
        """Bits a weight of `shape` `[..., K, N]` occupies: packed codes, scales, packed zero points."""
        from lq_kernels.packing import packed_bits

        *lead, K, N = shape
        if self.widths is not None:
            self.check_segments(shape)
            part = K // len(self.widths), N
            return self.channel_bits(K) * K + sum(self.segment(bits).size_bits(part) for bits in self.widths)
        stack, groups = math.prod(lead), self.num_groups(K)
        scales = stack * groups * N * SCALE_BITS[self.scale_dtype]
        # Zero points that are codes are packed along N: transposed, N is the axis that is cut into words.
        zeros = packed_bits((stack * groups, N, 1), self.bits)
        if self.zero_dtype is not None:
            zeros = stack * groups * N * SCALE_BITS[self.zero_dtype]
        if self.mixes(shape):
            # As many bits in codes and zero points as without: widths average to `bits`. And what says which is which.
            scales += PERMUTATION_BITS * K + WIDTH_BITS * (K // SEGMENT_CHANNELS)
        if self.orders(shape):
            scales += self.channel_bits(K) * K
        residual = sum(factor.size_bits(factor_shape) for factor, factor_shape in self.residual(shape))
        return packed_bits(shape, self.bits) + scales + (0 if self.symmetric else zeros) + residual

    def mixes(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of `shape` has runs of channels of several widths: one matrix, cut without remainder."""
        cuts = len(shape) == 2 and shape[0] % SEGMENT_CHANNELS == 0 and shape[1] % 32 == 0
        return self.mixed and cuts and SEGMENT_CHANNELS < shape[0] <= 1 << PERMUTATION_BITS and 1 < self.bits < 8

    def segment(self, bits: int) -> "QuantSpec":
        """The spec of a segment of that width: all that is the same, of one width."""
        return dataclasses.replace(self, bits=bits, mixed=False, by_energy=False, widths=None)

    def orders(self, shape: tuple[int, ...]) -> bool:
        """Whether the groups of a weight of `shape` are by energy: where that is asked for, and there are several."""
        return self.widths is not None or (
            self.by_energy and self.segmentable(shape, 1) and self.num_groups(shape[0]) > 1
        )

    def channel_bits(self, in_features: int) -> int:
        """Stored per channel where groups are by energy: the number of its group."""
        return 8 if self.num_groups(in_features) <= 256 else 16

    def segmentable(self, shape: tuple[int, ...], count: int) -> bool:
        """Whether a weight of `shape` can be cut along its inputs into `count` segments of whole groups and words."""
        step = max(self.group_size or 0, LEAST_SEGMENT)
        return len(shape) == 2 and self.group_size is not None and shape[0] % (count * step) == 0

    def check_segments(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for a weight that cannot be cut into the segments that `widths` are of."""
        count = len(self.widths or (self.bits,))
        if not self.segmentable(shape, count):
            raise UserError(
                f"widths: a matrix {list(shape)} has no {count} segments of whole groups of {self.group_size} input "
                "channels; write fewer widths, or a smaller group_size"
            )

    def residual(self, shape: tuple[int, ...]) -> tuple[tuple["QuantSpec", tuple[int, ...]], ...]:
        """Spec and shape of the two factors of the low-rank residual of a weight of `shape`; none at rank 0.

        The left one `[..., K, rank]` has a scale per component, the right one `[..., rank, N]` per output channel. A
        rank beyond K or N is that of a full matrix.
        """
        if not self.rank:
            return ()
        *lead, K, N = shape
        rank = min(self.rank, K, N)
        factor = QuantSpec(bits=8, group_size=None, symmetric=True, scale_dtype=self.scale_dtype)
        return (factor, (*lead, K, rank)), (factor, (*lead, rank, N))

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        return self.size_bits(shape) / math.prod(shape)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "QuantSpec":
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(fields) - known
        if unknown or "bits" not in fields:
            problem = f"unknown field {sorted(unknown)[0]!r}" if unknown else "no field 'bits'"
            raise UserError(f"spec: {problem}; fields are {', '.join(sorted(known))}")
        given: dict[str, Any] = dict(fields)
        if isinstance(widths := given.get("widths"), list):  # as JSON has it
            given["widths"] = tuple(widths)
        return cls(**given)

    def __str__(self) -> str:
        group = "column" if self.group_size is None else f"g{self.group_size}"
        zeros = "-sym" if self.symmetric else f"-zero {self.zero_dtype}" if self.zero_dtype else ""
        more = (f"-rank {self.rank}" if self.rank else "") + ("-mixed" if self.mixed else "")
        more += "-by energy" if self.by_energy else ""
        width = self.bits if self.widths is None else ".".join(map(str, self.widths))
        return f"{self.format}{width}-{group}{zeros}{more}"


def smallest_first(specs: Iterable[QuantSpec]) -> list[QuantSpec]:
    """By width, and of equal widths the coarser groups first: in the order of their sizes, whatever the matrix."""
    return sorted(specs, key=lambda spec: (spec.bits, -(spec.group_size or math.inf)))
