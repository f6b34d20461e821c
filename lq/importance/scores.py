"""`Scores`: one number per unit of a model, larger = deserves more bits. The canonical direction is made where a score
is computed and nowhere else; published code has been found to sort ZD the wrong way round for want of this."""

import dataclasses
import functools
import json
import math
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lq.atomic import write_text
from lq.errors import UserError
from lq.sealed import sealed, unsealed

MOST_WEIGHTS = 2**48  # of one matrix, so that bits are counted in 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Importance of every unit, first to last. JSON with `write` and `read`."""

    metric: str  # registered name, or a control's: "random", "reverse lim"
    values: dict[str, float]  # unit ("block_0", or a matrix path) -> score
    model: str  # fingerprint of the model
    shapes: dict[str, tuple[int, ...]]  # of every matrix of the model, so that a plan can be made without opening it
    other_weights: int  # weights that are in no matrix
    options: dict = dataclasses.field(default_factory=dict)
    calibration: str | None = None  # fingerprint of the tokens; None for scores that need none
    # What every unit is measured to lose: unit -> name of the spec (`str(QuantSpec)`) -> loss. Empty where it was not.
    costs: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    # What pairs lose beyond the sum of both: unit -> another -> spec of the one -> spec of the other -> loss. Each pair
    # once; what is not there is 0.
    interactions: dict[str, dict[str, dict[str, dict[str, float]]]] = dataclasses.field(default_factory=dict)
    passes: float | None = None  # what measuring took, in forward passes of the calibration text; None: not counted
    extra: dict = dataclasses.field(default_factory=dict)  # what else was measured, e.g. LIM without position 0

    def __post_init__(self):
        if self.other_weights < 0:
            raise UserError(f"score {self.metric}: other_weights: {self.other_weights}; score again")
        for path, shape in self.shapes.items():
            if len(shape) < 2 or min(shape) < 1 or math.prod(shape) > MOST_WEIGHTS:
                raise UserError(f"score {self.metric}: shapes: {path}: {list(shape)} is no [in, out]; score again")
        for unit, value in self.values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"score {self.metric}: {unit} is {value}; the weights or the calibration text are damaged"
                )
        if self.costs and (
            self.costs.keys() != self.values.keys()
            or not all(self.costs.values())
            or not all(math.isfinite(cost) for of_unit in self.costs.values() for cost in of_unit.values())
        ):
            raise UserError(f"score {self.metric}: costs that are not those of the units, or not finite; score again")
        pairs = [(unit, other, rows) for unit, others in self.interactions.items() for other, rows in others.items()]
        if len({frozenset(pair[:2]) for pair in pairs}) != len(pairs) or any(
            unit == other
            or not {unit, other} <= self.values.keys()
            or not all(math.isfinite(loss) for row in rows.values() for loss in row.values())
            for unit, other, rows in pairs
        ):
            raise UserError(f"score {self.metric}: interactions that are not of pairs of the units; score again")

    def ranking(self) -> list[str]:
        """Units, most important first. Ties keep the earlier unit first."""
        order = {unit: i for i, unit in enumerate(self.values)}
        return sorted(self.values, key=lambda unit: (-self.values[unit], order[unit]))

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(sealed(dataclasses.asdict(self)), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Scores":
        """Raises UserError when `path` is no scores file, or a damaged one."""
        try:
            data = unsealed(json.loads(Path(path).read_text(encoding="utf-8")))
            if not isinstance(data, dict):
                raise ValueError(f"{type(data).__name__} in place of a mapping")
            if unknown := data.keys() - {field.name for field in dataclasses.fields(cls)}:
                raise ValueError(f"{min(unknown)}: no key of it")
            return _of_these_types().validate_json(json.dumps(data), strict=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such scores file; make one with `lq score MODEL --metric lim`") from None
        except IsADirectoryError:
            raise UserError(f"{path}: a directory; give a file that `lq score` made") from None
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(mistake := first.get("ctx", {}).get("error"), UserError):
                raise UserError(f"{path}: {mistake}") from None
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: not a scores file ({where}: {first['msg']}); make one with `lq score`") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a scores file ({error}); make one with `lq score`") from None


@functools.cache
def _of_these_types() -> TypeAdapter[Scores]:
    """What a file must hold."""
    return TypeAdapter(Scores)
