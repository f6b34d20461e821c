"""Which models an experiment evaluates: the original, the uniform baselines, a plan per order and budget, the moves."""

import dataclasses
from collections.abc import Iterator, Mapping

from lq.allocation import Plan, allocate, uniform_plan
from lq.allocation.allocate import Pin
from lq.importance import METRICS, Scores
from lq.models.config import ModelConfig
from lq.models.matrices import model_shapes, other_weights
from lq.numerics.spec import QuantSpec
from lq.runs.config import Experiment, Order
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
    for budget in x.allocation.budgets:
        for order in x.allocation.orders:
            for seed in order.each_seed():
                plan = _allocated(x, scores[order.name, seed], budget)
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


def check_orders_and_budgets(x: Experiment, config: ModelConfig) -> None:
    """Raises UserError for an unknown metric or option and for a budget out of reach, before anything is computed.

    What can be reached does not depend on the scores, so any do.
    """
    placeholder = Scores(
        metric="none",
        values={f"block_{i}": 0.0 for i in range(config.num_blocks)},
        model="",
        shapes=model_shapes(config),
        other_weights=other_weights(config),
    )
    scores = {}
    for order in orders_of(x):
        for seed in order.each_seed():
            METRICS.options(order.metric, order.options if seed is None else {**order.options, "seed": seed})
            scores[order.name, seed] = placeholder
    for _ in candidates(x, config, "", scores):
        pass


def base_spec(x: Experiment) -> QuantSpec:
    """The spec all matrices share but for their width."""
    q = x.quantization
    return QuantSpec(bits=8, group_size=q.group_size, symmetric=q.symmetric, scale_dtype=q.scale_dtype)


def _label(order: Order, seed: int | None) -> str:
    return order.name if seed is None else f"{order.name} {seed}"


def _uniform(x: Experiment, config: ModelConfig, model: str) -> Iterator[Candidate]:
    spec = base_spec(x)
    finer = [g for g in (64, 32) if spec.group_size is None or g < spec.group_size] if x.baselines.finer_groups else []
    for bits in x.baselines.uniform:
        plan = uniform_plan(config, dataclasses.replace(spec, bits=bits), model=model)
        yield Candidate(name=f"uniform {bits}", group="uniform", plan=plan)
        for group_size in finer if bits < 8 else []:
            plan = uniform_plan(config, dataclasses.replace(spec, bits=bits, group_size=group_size), model=model)
            yield Candidate(name=f"uniform {bits}, groups of {group_size}", group="finer_groups", plan=plan)


def _allocated(x: Experiment, scores: Scores, budget: float) -> Plan:
    a = x.allocation
    return allocate(
        scores,
        bpw=budget,
        bits=a.bits,
        spec=base_spec(x),
        method=a.method,
        pins=[Pin(pattern=pin.match, bits=pin.bits) for pin in a.pins],
        embedding_bits=a.embedding_bits,
        head_bits=a.head_bits,
        count=a.count,
    )


def _moves(x: Experiment, config: ModelConfig, model: str, scores: AllScores) -> Iterator[Candidate]:
    """The paper's sweep: the k least important blocks at the low width, the others at the high one, k = 0 .. L."""
    if x.moves is None:
        return
    moves, total = x.moves, config.num_blocks
    spec = base_spec(x)
    plan = uniform_plan(config, dataclasses.replace(spec, bits=moves.high), model=model)
    low = dataclasses.replace(spec, bits=moves.low)
    for order in moves.orders:
        for seed in order.each_seed():
            ranking = scores[order.name, seed].ranking()
            for count in sorted({*range(0, total + 1, moves.every), total}):
                lowered = set(ranking[total - count :])
                specs = {path: low if path.split("/")[0] in lowered else s for path, s in plan.specs.items()}
                yield Candidate(
                    name=f"{_label(order, seed)}: {count} of {total} blocks at {moves.low} bits",
                    group="move",
                    order=order.name,
                    seed=seed,
                    plan=dataclasses.replace(plan, specs=specs, provenance={"metric": order.name, "moved": count}),
                )
