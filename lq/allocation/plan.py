"""`Plan`: a spec for every matrix that is quantized, and where the plan came from. One JSON file.

Two sizes are kept apart everywhere. *Code bits* are the mean width of the codes, what papers call average bits. *bpw*,
bits per weight, is the true cost with scales and zero points; budgets are in bpw. Both are means over the *counted*
weights: the linear matrices of the blocks, and the embedding and head as well when `count` is "all" (in 16 bits where
they are not quantized).
"""

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Literal, get_args

from lq.atomic import write_text
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.matrices import block_of, matrices, model_shapes, other_weights
from lq.numerics.spec import QuantSpec
from lq.sealed import sealed, unsealed

DENSE_BITS = 16  # what a weight that is not quantized costs

Count = Literal["blocks", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which matrix gets which spec."""

    specs: dict[str, QuantSpec]  # matrix path -> spec; matrices without one stay dense
    shapes: dict[str, tuple[int, ...]]  # of every matrix of the model, embedding and head included
    other_weights: int = (
        0  # norms, biases, learned positions, routers: always in 16 bits, never counted in the averages
    )
    count: Count = "blocks"  # what the averages and the budget are taken over
    model: str = ""  # fingerprint of the model the plan was made for
    provenance: dict = dataclasses.field(default_factory=dict)  # metric, allocator, target, seed ...

    def __post_init__(self):
        check_count(self.count)
        for path, spec in self.specs.items():
            if path not in self.shapes:
                raise UserError(f"plan: no matrix {path} in this model; make the plan from this model's scores")
            if not isinstance(spec, QuantSpec):
                raise UserError(f"plan: {path}: {spec!r} is no QuantSpec; write for example QuantSpec(bits=3)")

    def counted(self) -> list[str]:
        return [path for path in self.shapes if self.count == "all" or block_of(path) is not None]

    def size_bits(self, path: str) -> int:
        """Bits of one matrix under this plan, metadata included."""
        spec, shape = self.specs.get(path), self.shapes[path]
        return spec.size_bits(shape) if spec else DENSE_BITS * math.prod(shape)

    @property
    def bpw(self) -> float:
        """Bits per counted weight, scales and zero points included."""
        return sum(map(self.size_bits, self.counted())) / self._weights(self.counted())

    @property
    def code_bits(self) -> float:
        """Mean code width over the counted weights."""
        bits = sum(self._width(path) * math.prod(self.shapes[path]) for path in self.counted())
        return bits / self._weights(self.counted())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model: all matrices, counted or not, and the other weights."""
        return (sum(map(self.size_bits, self.shapes)) + DENSE_BITS * self.other_weights) // 8

    def bits_per_block(self) -> tuple[float, ...]:
        """Mean code width of each block."""
        paths = defaultdict(list)
        for path in self.shapes:
            if (index := block_of(path)) is not None:
                paths[index].append(path)
        return tuple(
            sum(self._width(p) * math.prod(self.shapes[p]) for p in paths[i]) / self._weights(paths[i])
            for i in range(len(paths))
        )

    def _width(self, path: str) -> float:
        return self.specs[path].code_bits if path in self.specs else DENSE_BITS

    def _weights(self, paths: list[str]) -> int:
        return sum(math.prod(self.shapes[path]) for path in paths)

    def to_dict(self) -> dict:
        """Specs are stored once each and referred to by number: a plan of 800 matrices stays readable."""
        distinct = sorted(set(self.specs.values()), key=str)
        number = {spec: i for i, spec in enumerate(distinct)}
        return {
            "model": self.model,
            "count": self.count,
            "other_weights": self.other_weights,
            "bpw": self.bpw,
            "code_bits": self.code_bits,
            "provenance": self.provenance,
            "specs": [spec.to_dict() for spec in distinct],
            "matrices": {
                p: [number[self.specs[p]] if p in self.specs else None, list(s)] for p, s in self.shapes.items()
            },
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Plan":
        specs = [QuantSpec.from_dict(fields) for fields in data["specs"]]
        entries = data["matrices"]
        for path, (number, _) in entries.items():
            if number is not None and (type(number) is not int or not 0 <= number < len(specs)):
                raise ValueError(f"matrices: {path}: no spec {number!r}")
        if type(data["other_weights"]) is not int:
            raise ValueError(f"other_weights {data['other_weights']!r}")
        return cls(
            specs={path: specs[number] for path, (number, _) in entries.items() if number is not None},
            shapes={path: tuple(shape) for path, (_, shape) in entries.items()},
            other_weights=data["other_weights"],
            count=data["count"],
            model=data["model"],
            provenance=data["provenance"],
        )

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(sealed(self.to_dict()), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Raises UserError when `path` is no plan, or a damaged one."""
        try:
            return cls.from_dict(unsealed(json.loads(Path(path).read_text(encoding="utf-8"))))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such plan; make one with `lq allocate SCORES --bpw 3.0 --out {path}`"
            ) from None
        except IsADirectoryError:
            raise UserError(f"{path}: a directory; give a file that `lq allocate` made") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a plan ({error!r}); make one with `lq allocate`") from None


def adapted(plan: Plan, config: ModelConfig, *, model: str | None = None) -> Plan:
    """A plan for the same matrices of a transformed model, which may have other norms and biases.

    Args:
      plan: made for the original.
      config: the transformed model's.
      model: its fingerprint; the plan's stays when None.

    Raises:
      UserError: a model with other matrices.
    """
    if plan.shapes != model_shapes(config):
        raise UserError("plan: made for another model; make it from this model's scores")
    return dataclasses.replace(plan, other_weights=other_weights(config), model=plan.model if model is None else model)


def check_count(count: object) -> None:
    """Raises UserError unless `count` is one of `Count`."""
    if count not in get_args(Count):
        raise UserError(f"count: {count!r}; write {' or '.join(get_args(Count))}")


def uniform_plan(config: ModelConfig, spec: QuantSpec, *, model: str = "", count: Count = "blocks") -> Plan:
    """Every block matrix at one spec, embedding and head dense."""
    specs = dict.fromkeys(matrices(config), spec)
    return Plan(
        specs=specs,
        shapes=model_shapes(config),
        other_weights=other_weights(config),
        count=count,
        model=model,
        provenance={"uniform": str(spec)},
    )
