"""`Scores`: one number per unit of a model, larger = deserves more bits. The canonical direction is made where a score
is computed and nowhere else; published code has been found to sort ZD the wrong way round for want of this."""

import dataclasses
import json
import math
from pathlib import Path

from lq.atomic import write_text
from lq.errors import UserError


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
        for unit, value in self.values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"score {self.metric}: {unit} is {value}; the weights or the calibration text are damaged"
                )
        if self.costs and (
            self.costs.keys() != self.values.keys()
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
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> "Scores":
        """Raises UserError when `path` is no scores file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            data["shapes"] = {name: _shape(name, shape) for name, shape in data["shapes"].items()}
            if type(data["other_weights"]) is not int:
                raise ValueError(f"other_weights: {data['other_weights']!r} is no whole number")
            return cls(**data)
        except FileNotFoundError:
            raise UserError(f"{path}: no such scores file; make one with `lq score MODEL --metric lim`") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: not a scores file ({error}); make one with `lq score`") from None


def _shape(name: str, value: object) -> tuple[int, ...]:
    """Raises ValueError unless `value` is a matrix's shape, `[in, out]`, or a stack's."""
    if not isinstance(value, list) or len(value) < 2 or any(type(n) is not int or n < 1 for n in value):
        raise ValueError(f"shapes: {name}: {value!r} is no [in, out]")
    return tuple(value)
