"""Descent: what a step from the plan at hand costs is foretold there from gradients, and the plan is made again.

Prices of units one at a time in a clean model (`lq.importance.predicted`) know nothing of what their errors do to each
other: of a plan that they make, they foresee a half to two thirds of what it loses. Around a plan whose errors are dW
two gradients know it. With D = dW_k(o) - dW_k(now), a step of unit k from where it is to option o costs

    KL(after) - KL(now)  =  <g, D>  +  1/2 E_y <G_y, D>^2  +  third order.

g is the gradient of the divergence at the plan, exact on the text, in which the errors of all other units are; G_y are
those of log-likelihoods of drawn labels at the original, whose products with all errors are kept from the beginning. So
a round costs one backward pass, and a forward pass to see whether the model that the quantizer makes of the new plan
loses less; if it does not, fewer steps are tried (`lq.search.tolls`).

The first plan is the exact solution of the prices in the clean model, unless the start loses less. Units are segments
of the input axis, those of most energy first, or whole matrices.

This is lq's own: sequential refinement, whose costs are measured one step at a time (`lq.search.refine`), with the
gradients of AutoScheme and mlx-lm (`lq.importance.delta_loss`) at a plan in place of a uniform model, and a curvature.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from lq.allocation.choices import Choices
from lq.allocation.knapsack import knapsack
from lq.allocation.plan import Plan
from lq.allocation.problem import Choice, Problem
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.backward import Backward
from lq.importance.predicted import PredictedOptions, UnitErrors, check_labels
from lq.importance.scores import Scores
from lq.importance.units import segment_of
from lq.models.matrices import block_of
from lq.models.source import Dequantized, InMemory, ParameterSource
from lq.numerics.spec import QuantSpec
from lq.quantizers import Recipe, quantized_source
from lq.search.formats import format_of, of_blocks
from lq.search.tolls import with_tolls


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentOptions:
    generations: int = 2  # rounds around a plan; it ends before when no plan is better
    segment_channels: int | Literal["group"] | None = "group"  # input channels of a unit; None: whole matrices
    draws: int = 8  # of labels, a backward pass each, at the original
    seed: int = 0  # of the labels

    def __post_init__(self):
        if self.generations < 0:
            raise UserError(f"generations: {self.generations}; write 0 or more")
        check_labels(self.draws, self.seed)


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan, what its model loses on the text, and the forward passes so far."""

    plan: Plan
    loss: float
    passes: float


def descend(
    source: ParameterSource,
    plan: Plan,
    windows: Windows,
    bits: Sequence[int],
    recipe: Recipe,
    batch_size: int,
    options: DescentOptions,
) -> Iterator[Found]:
    """Descent: steps from the plan are foretold by gradients there, and the plan of them is kept if it loses less.

    Yields the first plan, and the one behind every round; it ends with a round in which nothing better was found.

    Args:
      source: the original, dense.
      plan: the size that may not be exceeded, and the format. What is dense in it, embedding and head stay; models are
        judged without what the plan makes of the last two.
      windows: text, to quantize by and to judge on.
      bits: widths to choose from.
      recipe: the quantizer.
      batch_size: windows per device step.
      options: of the search.

    Raises:
      UserError: a plan of several formats, a quantizer of which segments cannot be priced, packed weights.
    """
    if recipe.scaling is not None or recipe.bias_correction:
        raise UserError(
            f"descent: {recipe.name} changes more than matrices, of which alone a cost can be told; leave out what "
            "scales channels or corrects biases"
        )
    # Segments are by energy in any case, and a plan that has some already may be gone on from.
    spec = format_of(plan, bits, **({} if options.segment_channels is None else {"widths": None, "by_energy": False}))
    if spec.mixed or spec.rank:
        raise UserError("plan: mixed or of some rank, which descent does not price; make it of plain widths")
    priced = _prices_of(source, spec, plan, bits, recipe, batch_size, options)
    errors = UnitErrors(source, windows, priced)
    clean = Backward(source, windows, loss="sampled", seed=options.seed, draws=options.draws, batch_size=batch_size)
    judge = Backward(source, windows, loss="kl", batch_size=batch_size)
    products, gradients = errors.products(clean, source)
    formats = [dataclasses.replace(spec, bits=width) for width in priced.bits]
    units = _Units.of(plan, formats, products, gradients.tokens / len(gradients.losses))

    def judged(one: Plan) -> tuple[float, ParameterSource]:
        calibration = windows if recipe.calibrated else None
        quantized = quantized_source(source, of_blocks(one), recipe, calibration, batch_size=batch_size)
        model = _dequantized(source, quantized)
        return judge.loss(model), model

    def found() -> Found:
        # A start that is none of the choices is still what has to be beaten.
        kept, loss = (best, lost) if lost <= started[0] else (plan, started[0])
        return Found(kept, loss, clean.passes + judge.passes)

    choice, best = units.first()
    lost, model = judged(best)
    started, there = judged(plan), units.choice_of(plan)
    if started[0] < lost and there is not None:
        choice, best, (lost, model) = there, plan, started
    yield found()
    for _ in range(options.generations):
        slopes, _ = errors.products(judge, model)
        before = lost
        for tried in with_tolls(units.problem, choice, units.costs_around(choice, slopes, judge.tokens)):
            one = units.plan(tried)
            if (after := judged(one))[0] < lost:
                choice, best, (lost, model) = tried, one, after
                break
        yield found()
        if lost >= before:
            return


def _prices_of(
    source: ParameterSource,
    spec: QuantSpec,
    plan: Plan,
    bits: Sequence[int],
    recipe: Recipe,
    batch_size: int,
    options: DescentOptions,
) -> PredictedOptions:
    """What is priced. Raises UserError for what cannot be."""
    channels = spec.group_size if options.segment_channels == "group" else options.segment_channels
    segments = options.segment_channels is not None
    priced = PredictedOptions(
        unit="matrix",
        bits=sorted(set(bits)),
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        scale_dtype=spec.scale_dtype,
        zero_dtype=spec.zero_dtype,
        by_energy=spec.by_energy,
        method=recipe.method,
        options=dataclasses.asdict(recipe.options),
        batch_size=batch_size,
        draws=options.draws,
        seed=options.seed,
    )
    try:
        if segments:
            priced = dataclasses.replace(priced, unit="segment", segment_channels=channels or 0)
        ordered = dataclasses.replace(spec, by_energy=segments or spec.by_energy)
        recipe.check(source.config, dict.fromkeys(of_blocks(plan), ordered))
    except UserError as error:
        if not segments:
            raise
        raise UserError(f"{error}; or, for whole matrices, write the option segment_channels null") from None
    return priced


@dataclasses.dataclass(frozen=True)
class _Units:
    """What there is to choose, and what choices are foretold to cost."""

    start: Plan
    choices: Choices
    problem: Problem  # its costs are the prices in the clean model
    products: Mapping[str, Float[np.ndarray, "windows options"]]  # <G, dW> at the original
    per_window: float  # scored positions

    @classmethod
    def of(cls, plan: Plan, formats: list[QuantSpec], products, per_window: float) -> "_Units":
        costs = {unit: 0.5 * np.square(found).mean(0) / per_window for unit, found in products.items()}
        values = {unit: float(cost[0] - cost[-1]) for unit, cost in costs.items()}
        described = {"model": plan.model, "shapes": plan.shapes, "other_weights": plan.other_weights}
        scores = Scores(metric="predicted_kl", values=values, **described)
        blocks = [path for path in plan.shapes if block_of(path) is not None]
        fixed = {path: None for path in blocks if path not in plan.specs}
        choices = Choices.of(scores, formats, fixed, "blocks")
        cost = np.array([costs[unit] for unit in choices.free]).reshape(-1, len(formats))
        size = choices.size
        budget = sum(map(plan.size_bits, blocks)) - choices.fixed_bits
        least = int(size.min(axis=1).sum())
        if budget < least:
            raise UserError(
                f"plan: {budget} bits, but segments, which store a byte or two a channel, take {least}; make it "
                "larger, or write the option segment_channels null"
            )
        return cls(plan, choices, Problem(cost=cost, size=size, budget=budget), products, per_window)

    def first(self) -> tuple[Choice, Plan]:
        """The exact solution of the prices in the clean model."""
        choice = knapsack(self.problem)
        return choice, self.plan(choice)

    def plan(self, choice: Choice) -> Plan:
        tables = {path: spec for path, spec in self.start.specs.items() if block_of(path) is None}
        return dataclasses.replace(self.start, specs=self.choices.specs(choice) | tables)

    def choice_of(self, plan: Plan) -> Choice | None:
        """The options that a plan has; None where it has none of these."""
        widths, found = [option.bits for option in self.choices.options], []
        for unit, paths in self.choices.free.items():
            spec, segment = plan.specs[paths[0]], segment_of(unit)
            cut = 1 if segment is None else segment[2]
            if spec.widths is not None and len(spec.widths) != cut:
                return None
            at = spec.bits if spec.widths is None else spec.widths[segment[1] if segment else 0]
            found.append(widths.index(at) if at in widths else -1)
        choice = np.array(found, int)
        return choice if (choice >= 0).all() and self.plan(choice).specs == dict(plan.specs) else None

    def costs_around(self, choice: Choice, slopes, tokens: int) -> Float[np.ndarray, "units options"]:
        """What every step from the choice changes the loss by; `slopes` are <g, dW> of every window at its model."""
        rows = []
        for unit, now in zip(self.choices.free, choice, strict=True):
            slope, product = slopes[unit].sum(0) / tokens, self.products[unit]
            curvature = 0.5 * np.square(product - product[:, now, None]).mean(0) / self.per_window
            rows.append(slope - slope[now] + curvature)
        return np.array(rows).reshape(-1, len(self.choices.options))


def _dequantized(original: ParameterSource, quantized: ParameterSource) -> ParameterSource:
    """A quantized model as a dense one: its blocks are kept packed on the host and dequantized when they are read."""
    blocks = {f"block_{i}": jax.device_get(quantized.block(i)) for i in range(original.config.num_blocks)}
    return Dequantized(InMemory(original.config, {"embed": original.embed(), **blocks, "head": original.head()}))
