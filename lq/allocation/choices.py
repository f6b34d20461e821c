"""What there is to decide: the units of scores with their matrices, what each may become, and how large that is."""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int

from lq.allocation.costs import Costs
from lq.allocation.plan import DENSE_BITS, Count
from lq.allocation.problem import Choice
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.importance.units import members, segment_name, segment_of
from lq.models.matrices import block_of
from lq.numerics.spec import QuantSpec, smallest_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """The units that are free, what each may become, and what is decided already.

    Raises UserError, when sizes are asked for, where a matrix cannot be cut into the segments that are units.
    """

    shapes: Mapping[str, tuple[int, ...]]
    options: list[QuantSpec]  # of every unit, smallest first
    free: dict[str, list[str]]  # unit -> its matrices that nothing decides, the most important unit first
    fixed: Mapping[str, QuantSpec | None]  # matrix -> what a pin makes it; None leaves it dense
    counted: list[str]  # matrices whose average a budget is about

    @classmethod
    def of(
        cls, scores: Scores, options: list[QuantSpec], fixed: Mapping[str, QuantSpec | None], count: Count
    ) -> "Choices":
        """Raises UserError for scores that do not cover the model's matrices once."""
        units = _units_of(scores, count)
        if any(map(segment_of, units)):
            _check_segments(options)
        free = {u: left for u in scores.ranking() if (left := [p for p in units[u] if p not in fixed])}
        counted = [path for path in scores.shapes if count == "all" or block_of(path) is not None]
        return cls(shapes=scores.shapes, options=options, free=free, fixed=fixed, counted=counted)

    @functools.cached_property
    def size(self) -> Int[np.ndarray, "units options"]:
        """Bits of every unit under every option, metadata included."""
        rows = [
            [sum(_size_in(unit, self.shapes[path], option) for path in paths) for option in self.options]
            for unit, paths in self.free.items()
        ]
        return np.array(rows, np.int64).reshape(-1, len(self.options))

    @property
    def fixed_bits(self) -> int:
        """Bits of what is decided already and counts."""
        return sum(_matrix_size(self.shapes[path], self.fixed[path]) for path in self.counted if path in self.fixed)

    @property
    def counted_weights(self) -> int:
        return sum(math.prod(self.shapes[path]) for path in self.counted)

    @property
    def weights(self) -> list[int]:
        """Number of weights of every unit, those of matrices that are decided too."""
        return [self._weights_of(members(unit, self.shapes)) // _parts_of(unit) for unit in self.free]

    @property
    def shares(self) -> Float[np.ndarray, " units"]:
        """What share of every unit's weights is not decided."""
        free = [self._weights_of(paths) // _parts_of(unit) for unit, paths in self.free.items()]
        return np.array(free, float) / np.array(self.weights, float)

    def _weights_of(self, paths: Iterable[str]) -> int:
        return sum(math.prod(self.shapes[path]) for path in paths)

    def specs(self, choice: Choice) -> dict[str, QuantSpec]:
        """Matrix -> spec, in the model's order; of what stays dense none."""
        chosen = {unit: self.options[option] for unit, option in zip(self.free, choice, strict=True)}
        specs = _specs_of(chosen, self.free) | {p: s for p, s in self.fixed.items() if s is not None}
        return {path: specs[path] for path in self.shapes if path in specs}


def _check_segments(options: list[QuantSpec]) -> None:
    """Raises UserError for options that segments of a matrix cannot have."""
    if len({option.group_size for option in options}) > 1:
        raise UserError("group_sizes: the segments of a matrix share one; write one")
    if options[0].group_size is None:
        raise UserError("group_size: a column is one group, and segments hold whole ones; write that of the scores")
    if options[0].by_energy or options[0].mixed:
        raise UserError(
            "by_energy, mixed: groups of segments are by energy, and widths theirs, in any case; leave both out"
        )


def options_among(spec: QuantSpec, bits, group_sizes, costs: Costs) -> list[QuantSpec]:
    """What a unit's matrices may become, smallest first."""
    if not bits:
        raise UserError("bits: no width to choose from; write for example 2,4")
    sizes = [spec.group_size] if group_sizes is None else list(dict.fromkeys(group_sizes))
    if not sizes:
        raise UserError("group_sizes: none to choose from; write for example 64,128")
    if len(sizes) > 1 and costs != "measured":
        raise UserError(
            f"group_sizes: {len(sizes)} to choose from, but costs by {costs} know widths alone; score by a metric that "
            "measures, such as kl with option group_size=[64,128]"
        )
    pairs = itertools.product(sorted(set(bits)), sizes)
    return smallest_first(dataclasses.replace(spec, bits=width, group_size=size) for width, size in pairs)


def _units_of(scores: Scores, count: Count) -> dict[str, list[str]]:
    """Unit -> its matrices. Scores must cover every block matrix once, and may cover embedding and head."""
    shapes = scores.shapes
    units = {unit: members(unit, shapes) for unit in scores.values}
    owners = defaultdict(list)  # of a matrix as many as the segments it is cut into
    for unit, found in units.items():
        for path in found:
            owners[path].append(unit)
    for path in shapes:
        table, parts = block_of(path) is None, list(map(_parts_of, owners[path]))
        if parts != [len(parts)] * max(len(parts), 1) and not (table and not parts):
            found = "no value" if len(parts) < max(parts, default=1) else "more than one unit"
            raise UserError(f"scores {scores.metric}: {found} for {path}; score this very model with `lq score`")
        named = {segment_name(path, index, len(parts)) for index in range(len(parts))}
        if any(map(segment_of, owners[path])) and (missing := sorted(named - set(owners[path]))):
            raise UserError(f"scores {scores.metric}: no value for {missing[0]}; score this very model with `lq score`")
        if table and parts and count != "all":
            raise UserError(f"scores {scores.metric}: {path} is a unit, but only blocks are counted; write count all")
    for unit, found in units.items():
        if not found:
            raise UserError(
                f"scores {scores.metric}: unit {unit} is not in this model; score this very model with `lq score`"
            )
    return units


def _parts_of(unit: str) -> int:
    """How many such units make up the matrix that the unit is a segment of; 1 for a unit of whole matrices."""
    segment = segment_of(unit)
    return segment[2] if segment else 1


def _matrix_size(shape: tuple[int, ...], spec: QuantSpec | None) -> int:
    """Bits of one matrix; of a dense one without a spec."""
    return spec.size_bits(shape) if spec else DENSE_BITS * math.prod(shape)


def _size_in(unit: str, shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Bits that a matrix, or its segment that is the unit, takes under a spec."""
    count = _parts_of(unit)
    if count == 1:
        return _matrix_size(shape, spec)
    if not spec.segmentable(shape, count):
        raise UserError(
            f"unit: {unit}: a matrix {list(shape)} has no {count} segments of whole groups of {spec.group_size}; write "
            "a smaller group size, or score with longer segments"
        )
    K, N = shape
    return spec.channel_bits(K) * (K // count) + spec.segment(spec.bits).size_bits((K // count, N))


def _specs_of(chosen: Mapping[str, QuantSpec], paths: Mapping[str, list[str]]) -> dict[str, QuantSpec]:
    """Path -> spec, from the option of every unit. Segments of a matrix become one spec, with groups by energy."""
    found, segments = {}, defaultdict(dict)
    for unit, spec in chosen.items():
        if segment := segment_of(unit):
            segments[segment[0]][segment[1]] = spec
        else:
            found |= dict.fromkeys(paths[unit], spec)
    for path, by_index in segments.items():
        widths = tuple(by_index[index].bits for index in range(len(by_index)))
        one = len(set(widths)) == 1
        found[path] = dataclasses.replace(by_index[0], bits=max(widths), by_energy=one, widths=None if one else widths)
    return found
