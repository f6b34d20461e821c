"""From scores and a budget to a plan: what is free, what is pinned, what can be reached."""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real

import numpy as np

from lq.allocation.annealing import AnnealingOptions, annealing
from lq.allocation.costs import Costs, costs_for, expected_costs
from lq.allocation.interactions import interactions_of
from lq.allocation.knapsack import knapsack
from lq.allocation.milp import integer_program
from lq.allocation.plan import DENSE_BITS, Count, Plan, check_count
from lq.allocation.problem import NoOptions, Problem
from lq.allocation.proportional import ProportionalOptions, proportional
from lq.allocation.quadratic import QuadraticOptions, quadratic
from lq.allocation.rank import rank
from lq.allocation.relaxation import greedy, lagrangian
from lq.allocation.water_filling import water_filling
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.importance.units import members, segment_of
from lq.models.matrices import block_of
from lq.numerics.spec import SEGMENT_BITS, QuantSpec, smallest_first
from lq.registry import Method, Registry

# Functions (problem, options) -> the option of every unit.
ALLOCATORS = Registry(
    "allocator",
    {
        "rank": Method(function=rank, options=NoOptions),
        "greedy": Method(function=greedy, options=NoOptions),
        "lagrangian": Method(function=lagrangian, options=NoOptions),
        "knapsack": Method(function=knapsack, options=NoOptions),
        "milp": Method(function=integer_program, options=NoOptions),
        "proportional": Method(function=proportional, options=ProportionalOptions),
        "water_filling": Method(function=water_filling, options=NoOptions),
        "annealing": Method(function=annealing, options=AnnealingOptions),
        "quadratic": Method(function=quadratic, options=QuadraticOptions),
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pin:
    """Matrices whose path matches `pattern` (anywhere in it) get `bits`, whatever their score; 16 leaves them dense."""

    pattern: str
    bits: int

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise UserError(f"pin {self.pattern!r}: no pattern; write a text such as 'v_proj$'")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pin {self.pattern!r}: not a regular expression ({error})") from None
        if self.bits != 16 and self.bits not in range(1, 9):
            raise UserError(f"pin {self.pattern!r}: {self.bits} bits; write 1 to 8, or 16 to leave the matrix dense")


def allocate(
    scores: Scores,
    *,
    bpw: float | None = None,
    nbytes: int | None = None,
    bits: Sequence[int] = (2, 4),
    spec: QuantSpec | None = None,
    group_sizes: Sequence[int | None] | None = None,
    method: str = "rank",
    options: Mapping[str, object] | None = None,
    costs: Costs | None = None,
    pins: Sequence[Pin] = (),
    embedding_bits: int = 16,
    head_bits: int = 16,
    count: Count = "blocks",
) -> Plan:
    """Chooses a width for every unit the scores name so that the budget is met.

    Args:
      scores: one number per unit, larger deserves more bits; they carry the model's shapes. Embedding and head are
        units where the scores name them ("embed/tokens", "head").
      bpw: target bits per counted weight, metadata included. The plan's is never above it, and within one smallest step
        below.
      nbytes: the target as bytes of the counted matrices instead; exactly one of the two is given, or none when `bits`
        leaves no choice.
      bits: widths to choose from.
      spec: group size, symmetry and scale dtype of every matrix; its own `bits` is ignored. `QuantSpec(bits=4)` when
        None.
      group_sizes: to choose from as well, a pair of width and group size for every unit; None: the spec's alone. Takes
        scores that measured them.
      method: a name in `ALLOCATORS`.
      options: fields of the allocator's options.
      costs: what a unit is taken to lose: as measured, by its place in the order, or by its score; see
        `lq.allocation.costs`. None: as measured where the scores say, by place where they do not.
      pins: rules, the first that matches a matrix decides; those that match none, and those that earlier ones leave
        nothing to decide, are listed in the plan's provenance (`unused_pins`, `shadowed_pins`).
      embedding_bits, head_bits: width of the embedding and of an untied head where they are no units; 16 leaves them
        dense.
      count: whether the average is over the blocks' matrices or over embedding and head too.

    Raises:
      UserError: a target out of reach (the message says the range), scores of another model, a width that does not
        exist, an argument of another type.
    """
    _check_types(bpw, nbytes, bits, spec, group_sizes, pins)
    check_count(count)
    costs = costs_for(scores, method, costs)
    spec = spec or QuantSpec(bits=4)
    shapes = scores.shapes
    options_of_all = _options(spec, bits, group_sizes, costs)
    units = _units(scores, shapes, count)
    if any(map(segment_of, units)) and len({option.group_size for option in options_of_all}) > 1:
        raise UserError("group_sizes: the segments of a matrix share one; write one")
    deciding = _deciding_pins(shapes, [*pins, *_table_pins(shapes, units, embedding_bits, head_bits)])
    fixed = {
        path: None if pin.bits == 16 else dataclasses.replace(spec, bits=pin.bits) for path, pin in deciding.items()
    }
    counted = [p for p in shapes if count == "all" or block_of(p) is not None]
    free = {unit: left for unit, paths in units.items() if (left := [p for p in paths if p not in fixed])}
    fixed_bits = sum(_size(shapes[p], fixed[p]) for p in counted if p in fixed)

    ordered = [u for u in scores.ranking() if u in free]  # of equals the more important is raised first
    size = [[sum(_size_in(u, shapes[p], option) for p in free[u]) for option in options_of_all] for u in ordered]
    size = np.array(size, np.int64).reshape(-1, len(options_of_all))
    total = sum(math.prod(shapes[p]) for p in counted)
    if bpw is None and nbytes is None and len(options_of_all) == 1:
        budget = fixed_bits + int(size.sum())
    else:
        budget = _budget_bits(bpw, nbytes, total)
        ends = [fixed_bits + int(size[:, at].sum()) for at in (0, -1)]
        _check_reachable(budget, ends, _among(bits, group_sizes, fixed_bits), total, nbytes is not None)

    weights = [sum(math.prod(shapes[p]) for p in free[u]) // _parts(u) for u in ordered]
    cost = expected_costs(scores, ordered, weights, options_of_all, costs)
    solver, chosen_options = ALLOCATORS[method].function, ALLOCATORS.options(method, options or {})
    pairs = interactions_of(scores, ordered, options_of_all) if costs == "measured" else None
    choice = solver(Problem(cost=cost, size=size, budget=budget - fixed_bits, interactions=pairs), chosen_options)
    specs = _specs({u: options_of_all[option] for u, option in zip(ordered, choice, strict=True)}, free)
    specs |= {p: s for p, s in fixed.items() if s is not None}
    provenance = {
        "metric": scores.metric,
        "metric_options": scores.options,
        "calibration": scores.calibration,
        "allocator": method,
        **({} if method == "rank" else {"costs": costs}),
        "target": {"bytes": nbytes} if nbytes is not None else {"bpw": bpw},
        "bits": sorted(set(bits)),
        **({"group_sizes": list(group_sizes)} if group_sizes is not None else {}),
        **_idle_pins(shapes, pins, deciding),
    }
    return Plan(
        specs={p: specs[p] for p in shapes if p in specs},
        shapes=shapes,
        other_weights=scores.other_weights,
        count=count,
        model=scores.model,
        provenance=provenance,
    )


def _check_types(bpw, nbytes, bits, spec, group_sizes, pins) -> None:
    """Raises UserError, naming the argument, for one that is of another type than `allocate` says."""
    if bpw is not None and (not isinstance(bpw, Real) or isinstance(bpw, bool)):
        raise UserError(f"bpw: {bpw!r} is not a number; write for example bpw=3.0")
    if nbytes is not None and (not isinstance(nbytes, Integral) or isinstance(nbytes, bool)):
        raise UserError(f"nbytes: {nbytes!r} is not a whole number; write for example nbytes=4000000")
    if not isinstance(bits, Collection) or isinstance(bits, str) or any(type(width) is not int for width in bits):
        raise UserError(f"bits: {bits!r} is no list of widths; write for example bits=(2, 4)")
    if spec is not None and not isinstance(spec, QuantSpec):
        raise UserError(f"spec: {spec!r} is no QuantSpec; write for example QuantSpec(bits=4)")
    if group_sizes is not None and (not isinstance(group_sizes, Collection) or isinstance(group_sizes, str)):
        raise UserError(f"group_sizes: {group_sizes!r} is no list; write for example group_sizes=(64, 128)")
    if not isinstance(pins, Collection):
        raise UserError(f"pins: {pins!r} is no list; write for example pins=[Pin(pattern='v_proj$', bits=8)]")
    for pin in pins:
        if not isinstance(pin, Pin):
            raise UserError(f"pins: {pin!r} is no Pin; write for example Pin(pattern='v_proj$', bits=8)")


def _options(spec: QuantSpec, bits, group_sizes, costs: Costs) -> list[QuantSpec]:
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


def _size(shape: tuple[int, ...], spec: QuantSpec | None) -> int:
    """Bits of one matrix; of a dense one without a spec."""
    return spec.size_bits(shape) if spec else DENSE_BITS * math.prod(shape)


def _parts(unit: str) -> int:
    """How many such units make up the matrix that the unit is a segment of; 1 for a unit of whole matrices."""
    segment = segment_of(unit)
    return segment[2] if segment else 1


def _size_in(unit: str, shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Bits that a matrix, or its segment that is the unit, takes under a spec.

    Of the segments of a matrix that all get one width less is stored: the matrix is not cut then.
    """
    count = _parts(unit)
    if count == 1:
        return _size(shape, spec)
    if not spec.segmentable(shape, count):
        raise UserError(
            f"unit: {unit}: a matrix {list(shape)} has no {count} segments of whole groups of {spec.group_size}; write "
            "a smaller group size, or score with longer segments"
        )
    K, N = shape
    return SEGMENT_BITS * (K // count) + spec.size_bits((K // count, N))


def _specs(chosen: Mapping[str, QuantSpec], paths: Mapping[str, list[str]]) -> dict[str, QuantSpec]:
    """Path -> spec, from the option of every unit. Segments of several widths become one spec with `widths`."""
    found, segments = {}, defaultdict(dict)
    for unit, spec in chosen.items():
        if segment := segment_of(unit):
            segments[segment[0]][segment[1]] = spec
        else:
            found |= dict.fromkeys(paths[unit], spec)
    for path, by_index in segments.items():
        widths = tuple(by_index[index].bits for index in range(len(by_index)))
        same = dataclasses.replace(by_index[0], bits=max(widths))
        found[path] = same if len(set(widths)) == 1 else dataclasses.replace(same, widths=widths)
    return found


def _units(scores: Scores, shapes: Mapping[str, tuple[int, ...]], count: Count) -> dict[str, list[str]]:
    """Unit -> its matrices. Scores must cover every block matrix once, and may cover embedding and head."""
    units = {unit: members(unit, shapes) for unit in scores.values}
    owners = defaultdict(list)  # of a matrix as many as the segments it is cut into
    for unit, found in units.items():
        for path in found:
            owners[path].append(_parts(unit))
    for path in shapes:
        table, parts = block_of(path) is None, owners[path]
        if parts != [len(parts)] * max(len(parts), 1) and not (table and not parts):
            found = "no value" if len(parts) < max(parts, default=1) else "more than one unit"
            raise UserError(f"scores {scores.metric}: {found} for {path}; score this very model with `lq score`")
        if table and parts and count != "all":
            raise UserError(f"scores {scores.metric}: {path} is a unit, but only blocks are counted; write count all")
    for unit, found in units.items():
        if not found:
            raise UserError(
                f"scores {scores.metric}: unit {unit} is not in this model; score this very model with `lq score`"
            )
    return units


def _table_pins(shapes, units: Mapping[str, list[str]], embedding_bits: int, head_bits: int) -> list[Pin]:
    """The two options for the tables, as the rules they are; none for a table that is a unit, unless it is given."""
    for name, bits in (("embedding_bits", embedding_bits), ("head_bits", head_bits)):
        if bits != 16 and bits not in range(1, 9):
            raise UserError(f"{name}: {bits}; write 1 to 8, or 16 to leave it dense")
    if head_bits != 16 and "head" not in shapes:
        raise UserError("head_bits: this model's head is its embedding; write embedding_bits")
    widths = {"embed/tokens": embedding_bits, "head": head_bits}
    return [Pin(pattern=f"^{path}$", bits=bits) for path, bits in widths.items() if bits != 16 or path not in units]


def _deciding_pins(shapes, pins: Sequence[Pin]) -> dict[str, Pin]:
    """Path -> the first pin that matches it, for every matrix the allocator may not touch."""
    matches = {path: [pin for pin in pins if re.search(pin.pattern, path)] for path in shapes}
    return {path: found[0] for path, found in matches.items() if found}


def _idle_pins(shapes, pins: Sequence[Pin], deciding: Mapping[str, Pin]) -> dict[str, list[str]]:
    """Patterns that match no matrix, and patterns all of whose matrices an earlier pin decides."""
    at_work = {id(pin) for pin in deciding.values()}
    idle = [pin.pattern for pin in pins if id(pin) not in at_work]
    unused = [pattern for pattern in idle if not any(re.search(pattern, path) for path in shapes)]
    return {"unused_pins": unused, "shadowed_pins": [pattern for pattern in idle if pattern not in unused]}


def _budget_bits(bpw: float | None, nbytes: int | None, total: int) -> int:
    if nbytes is not None and bpw is None:
        return 8 * nbytes
    if bpw is None or nbytes is not None:
        raise UserError(
            "budget: give bits per weight (--bpw 3.0) or bytes (--bytes 4000000), one of the two; neither only when "
            "there is one width"
        )
    if not (math.isfinite(bpw) and bpw > 0):
        raise UserError(f"budget: {bpw} bits per weight; write a positive number such as 3.0")
    # A target such as 3.1 is not a binary fraction: a plan that meets it exactly must not fail by a rounding error.
    return math.floor(bpw * total + 1e-6)


def _among(bits, group_sizes, fixed_bits: int) -> str:
    """What there is to choose from, in words."""
    widths = ", ".join(map(str, sorted(set(bits))))
    groups = "" if group_sizes is None else f" in groups of {' or '.join(map(str, group_sizes))}"
    return f"widths {widths}{groups}{' and what is pinned or dense' if fixed_bits else ''}"


def _check_reachable(budget: int, ends: Sequence[int], among: str, total: int, in_bytes: bool) -> None:
    low, high = ends
    if low <= budget <= high:
        return
    if in_bytes:
        wanted, shown = f"{budget // 8} bytes", (f"{-(-low // 8)}", f"{high // 8} bytes")
    else:
        # Rounded inwards, so that either end can be copied into the next command.
        least, most = math.ceil(low / total * 1e4) / 1e4, math.floor(high / total * 1e4) / 1e4
        wanted, shown = f"{budget / total:.4g} bits per weight", (f"{least:.4f}", f"{most:.4f}")
    reach = (
        f"reach {shown[0]} to {shown[1]}" if low < high else f"make exactly {high / total:.6f}; leave the budget out"
    )
    raise UserError(f"budget: {wanted} cannot be met; {among} (scales and zero points included) {reach}")
