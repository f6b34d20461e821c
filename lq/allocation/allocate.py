"""From scores and a budget to a plan: what is free, what is pinned, what can be reached."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real

from lq.allocation.annealing import AnnealingOptions, annealing
from lq.allocation.budget import budget_bits, check_reachable, in_words
from lq.allocation.choices import Choices, options_among
from lq.allocation.costs import Costs, costs_for, expected_costs
from lq.allocation.interactions import costs_beside, interactions_of
from lq.allocation.knapsack import knapsack
from lq.allocation.latency import NANOSECONDS, LatencyLimit, limit_of, read_latency
from lq.allocation.milp import integer_program
from lq.allocation.pins import Pin, deciding_pins, idle_pins, table_pins
from lq.allocation.plan import Count, Plan, check_count
from lq.allocation.problem import Choice, NoOptions, Problem
from lq.allocation.proportional import ProportionalOptions, proportional
from lq.allocation.quadratic import QuadraticOptions, quadratic, solve_quadratic
from lq.allocation.rank import rank
from lq.allocation.relaxation import greedy, lagrangian
from lq.allocation.water_filling import water_filling
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.importance.units import segment_of
from lq.numerics.spec import QuantSpec
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
        "quadratic": Method(function=quadratic, options=QuadraticOptions, proof=solve_quadratic),
    },
)


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
    latency: LatencyLimit | None = None,
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
      pins: rules, the first that matches a matrix decides; the rest of its unit is taken to lose its share of what the
        unit loses (`lq.allocation.costs`). Those that match none, and those that earlier ones leave
        nothing to decide, are listed in the plan's provenance (`unused_pins`, `shadowed_pins`).
      embedding_bits, head_bits: width of the embedding and of an untied head where they are no units; 16 leaves them
        dense.
      count: whether the average is over the blocks' matrices or over embedding and head too.
      latency: a second limit, for the time that the free units take together; what is pinned is not counted.

    Raises:
      UserError: a target or a latency out of reach (the message says the range), scores of another model, a width that
        does not exist, an argument of another type.
    """
    _check_types(bpw, nbytes, bits, spec, group_sizes, pins)
    if latency is not None and not isinstance(latency, LatencyLimit):
        raise UserError(f"latency: {latency!r} is no LatencyLimit; write LatencyLimit(table=path, seconds=0.02)")
    check_count(count)
    costs, spec = costs_for(scores, method, costs), spec or QuantSpec(bits=4)
    rules = [*pins, *table_pins(scores, embedding_bits, head_bits)]
    deciding = deciding_pins(scores.shapes, rules)
    fixed = {p: None if pin.bits == 16 else dataclasses.replace(spec, bits=pin.bits) for p, pin in deciding.items()}
    choices = Choices.of(scores, options_among(spec, bits, group_sizes, costs), fixed, count)
    budget = _budget(choices, bpw, nbytes, bits, group_sizes)
    problem = _problem(scores, choices, budget, costs, latency)
    choice, proved = _solve(problem, method, options or {})
    provenance = {
        "metric": scores.metric,
        "metric_options": scores.options,
        "calibration": scores.calibration,
        "allocator": method,
        **({"allocator_options": dict(options)} if options else {}),
        **({} if method == "rank" else {"costs": costs}),
        "target": {"bytes": nbytes} if nbytes is not None else {"bpw": bpw},
        **({"seconds": problem.total_latency(choice) / NANOSECONDS} if latency is not None else {}),
        **proved,
        "bits": sorted(set(bits)),
        **({"group_sizes": list(group_sizes)} if group_sizes is not None else {}),
        **idle_pins(scores.shapes, pins, deciding),
    }
    return Plan(
        specs=choices.specs(choice),
        shapes=scores.shapes,
        other_weights=scores.other_weights,
        count=count,
        model=scores.model,
        provenance=provenance,
    )


def _solve(problem: Problem, method: str, options: Mapping[str, object]) -> tuple[Choice, dict[str, float | None]]:
    """The choice; and where a method may end unproved, what the choice costs and what none costs less than."""
    solver, chosen = ALLOCATORS[method], ALLOCATORS.options(method, options)
    if solver.proof is None:
        return solver.function(problem, chosen), {}
    solved = solver.proof(problem, chosen)
    bound = solved.bound if math.isfinite(solved.bound) else None
    return solved.choice, {"objective": solved.objective, "bound": bound}


def _budget(choices: Choices, bpw, nbytes, bits, group_sizes) -> int:
    """Bits for all that counts. Raises UserError for a budget that is none, or that no choice meets."""
    least, most = (choices.fixed_bits + int(choices.size[:, end].sum()) for end in (0, -1))
    if bpw is None and nbytes is None and least == most:
        return most
    weights = choices.counted_weights
    budget = budget_bits(bpw, nbytes, weights)
    there = in_words(bits, group_sizes, pinned=choices.fixed_bits > 0)
    check_reachable(budget, least, most, there, weights, in_bytes=nbytes is not None)
    return budget


def _problem(scores: Scores, choices: Choices, budget: int, costs: Costs, latency: LatencyLimit | None) -> Problem:
    """What the allocator is given."""
    units, seconds = list(choices.free), None
    if latency is not None:
        if any(map(segment_of, units)):
            raise UserError("latency: of segments there is none; score whole matrices, or leave the limit out")
        seconds = read_latency(latency.table, choices.free, list(map(str, choices.options)))
    interactions = None
    cost = expected_costs(scores, units, choices.weights, choices.options, costs)
    if costs == "measured":
        cost = cost + costs_beside(scores, units, choices.options, choices.fixed)
        interactions = interactions_of(scores, units, choices.options)
    if interactions is not None:
        interactions = interactions.scaled(choices.shares)
    return Problem(
        cost=cost * choices.shares[:, None],
        size=choices.size,
        budget=budget - choices.fixed_bits,
        interactions=interactions,
        latency=seconds,
        limit=0 if latency is None else limit_of(latency.seconds),
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
