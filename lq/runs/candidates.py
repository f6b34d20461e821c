"""Which models an experiment evaluates: the original, the uniform baselines, a plan per order and budget, the moves."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lq.allocation import Plan, allocate
from lq.allocation.latency import LatencyLimit
from lq.allocation.pins import Pin
from lq.errors import UserError
from lq.importance import Scores
from lq.models.config import ModelConfig
from lq.models.matrices import model_shapes, other_weights
from lq.numerics.spec import QuantSpec
from lq.runs.config import Experiment, Order, at
from lq.runs.results import Group

AllScores = Mapping[tuple[str, int | None], Scores]  # (order name, seed) -> scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model to be evaluated."""

    name: str
    group: Group
    plan: Plan | None  # None: the original
    order: str | None = None
    seed: int | None = None
    target_bpw: float | None = None


def candidates(x: Experiment, config: ModelConfig, model: str, scores: AllScores) -> Iterator[Candidate]:
    """Every model of the experiment `x`, the original first. `model` is the fingerprint the plans carry.

    Raises UserError for a budget out of reach.
    """
    yield Candidate(name="original", group="original", plan=None)
    yield from _uniform(x, config, model)
    for number, budget in enumerate(x.allocation.budgets):
        for order in x.allocation.orders:
            for seed in order.each_seed():
                with at(f"allocation.budgets.{number}", drop="budget: "):
                    plan = _plan(x, scores[order.name, seed], x.quantization.spec, x.allocation.bits, budget)
                yield Candidate(
                    name=f"{_label(order, seed)} @ {budget:g}",
                    group="plan",
                    order=order.name,
                    seed=seed,
                    target_bpw=budget,
                    plan=plan,
                )
    yield from _moves(x, config, model, scores)


def orders_of(x: Experiment) -> list[Order]:
    """Every order the experiment needs scores for."""
    return [*x.allocation.orders, *(x.moves.orders if x.moves else [])]


def check_budgets(x: Experiment, config: ModelConfig) -> None:
    """Raises UserError for a budget out of reach and a head there is not, before anything is computed.

    What can be reached does not depend on the scores, so any do.
    """
    if x.allocation.head_bits != 16 and config.tie_embeddings:
        raise UserError("allocation.head_bits: this model's head is its embedding; write embedding_bits")
    none = _placeholder(config, "none", options=_options(x))
    for _ in candidates(
        x, config, "", {(order.name, seed): none for order in orders_of(x) for seed in order.each_seed()}
    ):
        pass


def _options(x: Experiment) -> list[QuantSpec]:
    """What the plans of the budgets choose from."""
    sizes = x.allocation.group_sizes or [x.quantization.group_size]
    return [
        dataclasses.replace(x.quantization.spec, bits=bits, group_size=size)
        for bits in x.allocation.bits
        for size in sizes
    ]


def _label(order: Order, seed: int | None) -> str:
    return order.name if seed is None else f"{order.name} {seed}"


def _uniform(x: Experiment, config: ModelConfig, model: str) -> Iterator[Candidate]:
    spec, scores = x.quantization.spec, _placeholder(config, "uniform", model)
    finer = [g for g in (64, 32) if spec.group_size is None or g < spec.group_size] if x.baselines.finer_groups else []
    for bits in x.baselines.uniform:
        yield Candidate(name=f"uniform {bits}", group="uniform", plan=_plan(x, scores, spec, [bits]))
        for group_size in finer if bits < 8 else []:
            plan = _plan(x, scores, dataclasses.replace(spec, group_size=group_size), [bits])
            yield Candidate(name=f"uniform {bits}, groups of {group_size}", group="finer_groups", plan=plan)


def _plan(x: Experiment, scores: Scores, spec: QuantSpec, bits: Sequence[int], budget: float | None = None) -> Plan:
    """A plan under the conventions all plans of `x` share: what is pinned, how wide the tables are, what is counted."""
    a = x.allocation
    deciding: dict[str, Any] = {}
    if budget is not None:
        limit = a.latency and LatencyLimit(table=Path(a.latency.table), seconds=a.latency.seconds)
        deciding = {"method": a.method, "options": a.options, "costs": a.costs, "group_sizes": a.group_sizes}
        deciding |= {"bpw": budget, "latency": limit}
    return allocate(
        scores,
        **deciding,
        bits=bits,
        spec=spec,
        pins=[Pin(pattern=pin.match, bits=pin.bits) for pin in a.pins],
        embedding_bits=a.embedding_bits,
        head_bits=a.head_bits,
        count=a.count,
    )


def _placeholder(config: ModelConfig, metric: str, model: str = "", options: Sequence[QuantSpec] = ()) -> Scores:
    """Scores for plans that do not depend on any: of blocks that lose the same at all `options`."""
    units = [f"block_{i}" for i in range(config.num_blocks)]
    return Scores(
        metric=metric,
        values=dict.fromkeys(units, 1.0),
        costs={unit: {str(option): 1.0 for option in options} for unit in units} if options else {},
        model=model,
        shapes=model_shapes(config),
        other_weights=other_weights(config),
    )


def _moves(x: Experiment, config: ModelConfig, model: str, scores: AllScores) -> Iterator[Candidate]:
    """The paper's sweep: the k least important blocks at the low width, the others at the high one, k = 0 .. L.

    What is pinned has one spec at either width, so it stays as it is.
    """
    if x.moves is None:
        return
    moves, total = x.moves, config.num_blocks
    spec, none = x.quantization.spec, _placeholder(config, "uniform", model)
    plan, low = (_plan(x, none, spec, [bits]) for bits in (moves.high, moves.low))
    for order in moves.orders:
        for seed in order.each_seed():
            ranking = scores[order.name, seed].ranking()
            for count in sorted({*range(0, total + 1, moves.every), total}):
                lowered = set(ranking[total - count :])
                specs = {p: low.specs[p] if p.split("/")[0] in lowered else s for p, s in plan.specs.items()}
                provenance = {**plan.provenance, "metric": order.name, "moved": count, "bits": [moves.low, moves.high]}
                yield Candidate(
                    name=f"{_label(order, seed)}: {count} of {total} blocks at {moves.low} bits",
                    group="move",
                    order=order.name,
                    seed=seed,
                    plan=dataclasses.replace(plan, specs=specs, provenance=provenance),
                )
