"""`QuantSpec`: how the weights of one matrix are stored, and what that costs to the bit.

A weight `[K, N]` (input, output channels) is cut along K into groups; each group of each output channel has one scale
and, when asymmetric, one zero point:

    w[k, n] ~ (code[k, n] - zero[g, n]) * scale[g, n],     g = k // group_size

Sizes counted here are sizes on disk and on the device: codes in whole uint32 words (`lq_kernels.packing`), scales in
their dtype, zero points as codes of the same width packed along the output axis. Nothing is rounded or left out, so
that a plan's bits per weight equal what the finished checkpoint measures.
"""

import dataclasses
import math
from typing import Literal

from lq.errors import UserError

SCALE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
GROUP_SIZES = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class QuantSpec:
    """Number format of one matrix. Hashable: the static part of a `QTensor`.

    Raises `UserError` for a width outside 1..8, an unknown group size or scale dtype, or a value of another type.
    """

    bits: int
    group_size: int | None = 128  # input channels per scale; None: the whole column
    symmetric: bool = False  # the zero point is the middle code, and not stored
    scale_dtype: str = "bfloat16"
    format: Literal["int"] = "int"

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
        stack, groups = math.prod(lead), self.num_groups(K)
        scales = stack * groups * N * SCALE_BITS[self.scale_dtype]
        # Zero points are packed along N: transposed, N is the axis that is cut into words.
        zeros = 0 if self.symmetric else packed_bits((stack * groups, N, 1), self.bits)
        return packed_bits(shape, self.bits) + scales + zeros

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
        return cls(**fields)

    def __str__(self) -> str:
        group = "column" if self.group_size is None else f"g{self.group_size}"
        return f"{self.format}{self.bits}-{group}{'-sym' if self.symmetric else ''}"
