"""Search: plans found by trying them. `SEARCHES` is the registry.

An allocator believes its costs; a search asks the model. Every one starts from a plan and stays within its size. A
searching function takes (problem, start, loss, windows of text, options) and yields one generation after the other;
options have `generations`, the most there are. `descent`, which takes gradients, is given the model itself.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lq.allocation.plan import Plan, adapted
from lq.allocation.problem import Problem
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation.candidates import Judge
from lq.importance.quantized import candidates_of
from lq.importance.units import Unit, units_of
from lq.models.source import ParameterSource
from lq.numerics.spec import QuantSpec
from lq.quantizers import Recipe
from lq.registry import Method, Registry
from lq.search.amq import AMQOptions, amq
from lq.search.descent import DescentOptions, Found, descend
from lq.search.evolution import EvolutionOptions, evolve
from lq.search.formats import format_of
from lq.search.generation import Generation
from lq.search.refine import RefineOptions, refine

SEARCHES = Registry(
    "search",
    {
        "evolution": Method(function=evolve, options=EvolutionOptions),
        "amq": Method(function=amq, options=AMQOptions),
        "refine": Method(function=refine, options=RefineOptions),
        "descent": Method(function=descend, options=DescentOptions, needs=frozenset({"model"})),
    },
)


def search(
    source: ParameterSource,
    plan: Plan,
    windows: Windows,
    *,
    bits: Sequence[int] = (2, 3, 4),
    unit: Unit = "matrix",
    method: str = "evolution",
    options: Mapping[str, object] | None = None,
    recipe: Recipe | None = None,
    batch_size: int = 8,
    on_generation: Callable[[Generation], None] = lambda found: None,
) -> Plan:
    """A plan of no more bits that loses less KL divergence to the original, found by trying.

    Args:
      source: the original, dense; it is held in memory as often as there are widths, and once more.
      plan: where the search begins, and what it may not exceed. Block matrices of one format; what is dense in it, and
        embedding and head, stay as they are.
      windows: text, to quantize by and to judge on.
      bits: widths to choose from; the plan's are among them.
      unit: what changes its width together; of `descent`, its options say.
      method, options: a name in `SEARCHES`, and its options.
      recipe: the quantizer the candidates are made by; plain rounding when None.
      batch_size: windows per device step.
      on_generation: called with each.

    Raises:
      UserError: a plan of another model or of several formats, widths that it has and `bits` has not, units of several
        widths, options that do not exist.
    """
    recipe, chosen_options = recipe or Recipe(), SEARCHES.options(method, options or {})
    plan = adapted(plan, source.config)
    if "model" in SEARCHES[method].needs:
        if unit != "matrix":
            raise UserError(f"unit: {unit}, but {method} has segments or matrices; write its option segment_channels")
        steps = SEARCHES[method].function(source, plan, windows, bits, recipe, batch_size, chosen_options)
        last = _last_of(steps, on_generation)
        provenance = _provenance(plan, windows, method, chosen_options, recipe, last.passes)
        return dataclasses.replace(last.plan, provenance=provenance | {"bits": sorted(set(bits))})
    same = format_of(plan, bits)
    specs = [dataclasses.replace(same, bits=width) for width in sorted(set(bits))]
    units = _free_units(source, plan, unit)
    judge = Judge(candidates_of(source, specs, recipe, windows, batch_size), windows, batch_size=batch_size)
    widths = [spec.bits for spec in specs]
    start = np.array([widths.index(plan.specs[paths[0]].bits) for paths in units.values()])
    size = np.array([[_size(plan, paths, spec) for spec in specs] for paths in units.values()])
    problem = Problem(cost=np.zeros(size.shape), size=size, budget=int(size[np.arange(len(start)), start].sum()))

    def loss(choices: Sequence[np.ndarray], text: Sequence[int]) -> np.ndarray:
        return judge.kl_of([_by_path(units.values(), choice) for choice in choices], text).mean(1)

    best, front = start, ()
    for found in SEARCHES[method].function(problem, start, loss, len(windows.tokens), chosen_options):
        best, front = found.parent, found.front
        on_generation(found)
    bits_of = {path: specs[option] for path, option in _by_path(units.values(), best).items()}
    provenance = _provenance(plan, windows, method, chosen_options, recipe, judge.passes)
    if front:  # a digit for each unit, which tells its width by its place in `bits`
        provenance |= {"units": list(units), "bits": widths}
        provenance["front"] = [
            {"loss": loss, "size_bits": problem.total_size(choice), "options": "".join(map(str, choice))}
            for choice, loss in front
        ]
    return dataclasses.replace(plan, specs={**plan.specs, **bits_of}, provenance=provenance)


def _last_of(steps: Iterator[Found], on_generation: Callable[[Generation], None]) -> Found:
    """Runs a search that yields plans, the first before its first generation."""
    found = next(steps)
    for found in steps:
        on_generation(Generation(np.array([], int), found.loss))
    return found


def _provenance(plan: Plan, windows: Windows, method: str, options, recipe: Recipe, passes: float) -> dict[str, Any]:
    """What every search says of itself."""
    return {
        "search": method,
        "search_options": dataclasses.asdict(options),
        "passes": passes,
        "recipe": recipe.to_dict(),
        "calibration": windows.fingerprint,
        "began_with": plan.provenance,
    }


def _size(plan: Plan, paths: Sequence[str], spec: QuantSpec) -> int:
    return sum(spec.size_bits(plan.shapes[path]) for path in paths)


def _by_path(units: Iterable[Sequence[str]], choice: np.ndarray) -> dict[str, int]:
    return {path: int(option) for paths, option in zip(units, choice, strict=True) for path in paths}


def _free_units(source: ParameterSource, plan: Plan, unit: Unit) -> dict[str, list[str]]:
    """The units that are quantized in the plan. Raises UserError where one has matrices of several widths."""
    found = {}
    for name, paths in units_of(source.config, unit).items():
        paths = [path for path in paths if path in plan.specs]
        if len({plan.specs[path] for path in paths}) > 1:
            raise UserError(f"unit: {name} has several widths in the plan; write a smaller unit, such as matrix")
        if paths:
            found[name] = paths
    return found
