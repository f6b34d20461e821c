"""SPQE, the Shapley value of quantizing a unit, and what pairs of units do to each other (IMPQ / CoopQ).

All units begin at the higher of two widths. In a random order they are lowered one after the other, and every one is
charged with what the model loses more at its turn, m_i. Over many orders

    phi_i = mean of m_i,     sum of phi_i = loss(all low) - loss(all high)  exactly, order by order.

An order and its reverse are drawn together: what a unit meets early in one it meets late in the other.

Two estimates of what pairs lose beyond the sum of both, q_i = 1 where unit i is low:

    covariance   as published: C = cov(m), K = (1 - shrink) C + shrink diag(C), a_i = phi_i - sum over j != i of K_ij,
                 loss = a^T q + q^T K q. It is an analogy and no estimate: of a game in which two units lose w
                 together and nothing else interacts, C_12 = -w^2 / 4, whatever the sign of w, and squared.
    conditional  ours: s_ij = mean of m_i where j is low already - mean of m_i where it is not. Then i is late, and the
                 others are likelier low as well, 2/3 against 1/3: of a game of pairs s_ij = w_ij + sum of the other
                 w_ik / 3 in expectation. So w_ij = 3/2 (s_ij - sum over k of s_ik / (L + 1)), its mean with w_ji, and
                 c_i = phi_i - sum over j of w_ij / 2, loss = sum c_i q_i + sum over pairs w_ij q_i q_j.

Either way the lower width's cost and the pairs, both low, go into the scores, for `lq allocate --method quadratic`.
What is less than `significance` of its standard errors is left out.

Late in an order the model may be so damaged that what it loses says little. `truncate` ends an order where the mean
negative log-likelihood is that many times the one at the beginning; the sum of phi then means nothing.

Source: Zhao et al., arXiv 2509.15455, blocks at 4 and 2 bits, some 100 orders. Their value is the negative
log-likelihood; KL divergence to the original has less noise, and no labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation.candidates import Judge
from lq.importance.quantized import QuantizedOptions, candidates_of
from lq.importance.units import Unit, units_of
from lq.models.source import ParameterSource

Marginals = Float[np.ndarray, "orders units"]  # NaN where an order ended before the unit's turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapleyOptions(QuantizedOptions):
    unit: Unit = "block"
    bits: list[int] = dataclasses.field(default_factory=lambda: [2, 4])  # two
    orders: int = 32  # an even number: each with its reverse
    value: Literal["kl", "nll"] = "kl"
    interactions: Literal["covariance", "conditional"] = "covariance"
    shrink: float = 0.5  # of the covariance towards its diagonal
    significance: float = 2.0  # standard errors below which a pair is left out
    truncate: float | None = None  # times the first negative log-likelihood
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if len(self.specs) != 2:
            raise UserError(f"bits: {self.bits}, group_size: {self.group_size}; write two formats, such as bits [2, 4]")
        if self.orders < 2 or self.orders % 2:
            raise UserError(f"orders: {self.orders}; write an even number from 2 up")
        if not 0 <= self.shrink <= 1:
            raise UserError(f"shrink: {self.shrink}; write 0 to 1")
        if not 0 <= self.significance < float("inf"):
            raise UserError(f"significance: {self.significance}; write standard errors, such as 2")
        if self.truncate is not None and not 1 < self.truncate < float("inf"):
            raise UserError(f"truncate: {self.truncate}; write a factor above 1, such as 2, or null")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed}; write 0 or more")


def shapley(source: ParameterSource, windows: Windows, options: ShapleyOptions) -> dict:
    """What lowering a unit adds, averaged over random orders, and interactions of pairs (SPQE of IMPQ / CoopQ)."""
    units = units_of(source.config, options.unit)
    candidates = candidates_of(source, options.specs, options.recipe, windows, options.batch_size)
    judge = Judge(candidates, windows, batch_size=options.batch_size)
    orders = antithetic_orders(len(units), options.orders, np.random.default_rng(options.seed))
    start = _Start.of(judge, units)
    found = [_marginals(judge, list(units.values()), order, start, options) for order in orders]
    marginals = np.array([of_order for of_order, _ in found])
    phi, error = mean_and_error(marginals)
    names = list(units)
    if (never := np.flatnonzero(np.isnan(phi))).size:
        raise UserError(
            f"truncate: {options.truncate}; no order of {options.orders} lasted until {names[never[0]]}; "
            "write more orders, a larger factor, or null"
        )
    cost, pairs = pair_terms(marginals, orders, options)
    low, high = map(str, options.specs)
    return {
        "values": {unit: float(value) for unit, value in zip(names, phi, strict=True)},
        "costs": {unit: {low: float(value), high: 0.0} for unit, value in zip(names, cost, strict=True)},
        "interactions": _named(pairs, names, low),
        "passes": judge.passes,
        "extra": {
            "standard_error": dict(zip(names, error.tolist(), strict=True)),
            "truncated": sum(cut for _, cut in found),
        },
    }


def antithetic_orders(units: int, orders: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random orders, each followed by its reverse."""
    return [way for _ in range(orders // 2) for order in (rng.permutation(units),) for way in (order, order[::-1])]


class _Start(NamedTuple):
    """Where every order begins: all units high."""

    choice: dict[str, int]
    inputs: list  # the hidden states at the input of every block
    losses: np.ndarray  # mean negative log-likelihood, mean KL

    @classmethod
    def of(cls, judge: Judge, units: Mapping[str, Sequence[str]]) -> "_Start":
        choice = {path: 1 for paths in units.values() for path in paths}
        inputs = [judge.inputs(choice)] * judge.candidates.config.num_blocks
        return cls(choice, inputs, _losses(judge, inputs, 0, choice))


def _marginals(
    judge: Judge, units: Sequence[Sequence[str]], order: np.ndarray, start: _Start, options: ShapleyOptions
) -> tuple[np.ndarray, bool]:
    """What every unit adds at its turn, and whether the order was ended early."""
    choice, inputs, before = dict(start.choice), list(start.inputs), start.losses
    column = 1 if options.value == "kl" else 0
    found = np.full(len(units), np.nan)
    for unit in order:
        choice |= dict.fromkeys(units[unit], 0)
        first = min(int(path.split("/")[0].removeprefix("block_")) for path in units[unit])
        after = _losses(judge, inputs, first, choice)
        found[unit] = after[column] - before[column]
        before = after
        if options.truncate is not None and after[0] > options.truncate * start.losses[0] and unit != order[-1]:
            return found, True
    return found, False


def _losses(judge: Judge, inputs: list, first: int, choice: Mapping[str, int]) -> np.ndarray:
    """What a choice loses that changed nothing before the block `first`; `inputs` of the blocks behind are renewed."""
    last = len(inputs) - 1
    for block in range(first, last):
        inputs[block + 1] = judge.states(inputs[block], block, choice, until=block + 1)
    return judge.losses_from(inputs[last], last, choice).mean(0)


def mean_and_error(marginals: Marginals) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each unit over the orders that reached it, and its standard error as if these were independent."""
    seen = ~np.isnan(marginals)
    count = seen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(seen, marginals, 0.0).sum(0) / count
        square = np.where(seen, (marginals - mean) ** 2, 0.0).sum(0)
        return mean, np.sqrt(square / np.maximum(count - 1, 1) / count)


def pair_terms(
    marginals: Marginals, orders: Sequence[np.ndarray], options: ShapleyOptions
) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, "units units"]]:
    """What a unit that is low costs by itself, and what each pair adds where both are; symmetric, 0 on the diagonal."""
    phi, _ = mean_and_error(marginals)
    if options.interactions == "covariance":
        C = covariance(marginals)
        deviation = np.sqrt(np.diag(C))
        noise = options.significance * np.outer(deviation, deviation) / np.sqrt(len(marginals))
        C = np.where((np.abs(C) < noise) & ~np.eye(len(C), dtype=bool), 0.0, C)
        return quadratic_terms(phi, C, options.shrink)
    pairs, error = conditional(marginals, orders)
    pairs = np.where(np.abs(pairs) < options.significance * error, 0.0, pairs)
    return phi - pairs.sum(1) / 2, pairs


def quadratic_terms(phi: Float[np.ndarray, " L"], C: Float[np.ndarray, "L L"], shrink: float):
    """a + diag K and 2 K: `a^T q + q^T K q` as costs of units, q_i^2 being q_i, and of pairs, each counted once."""
    diagonal = np.diag(np.diag(C))
    K = (1 - shrink) * C + shrink * diagonal
    outside = K - np.diag(np.diag(K))
    return phi - outside.sum(1) + np.diag(K), 2 * outside


def covariance(marginals: Marginals) -> Float[np.ndarray, "units units"]:
    """Over the orders that reached both units of a pair; 0 for pairs that fewer than two did."""
    mean, _ = mean_and_error(marginals)
    seen = (~np.isnan(marginals)).astype(float)
    centred = np.where(seen > 0, marginals - mean, 0.0)
    count = seen.T @ seen
    return np.where(count > 1, centred.T @ centred / np.maximum(count - 1, 1), 0.0)


def conditional(
    marginals: Marginals, orders: Sequence[np.ndarray]
) -> tuple[Float[np.ndarray, "units units"], Float[np.ndarray, "units units"]]:
    """w and about its standard errors, those of the differences; symmetric, 0 for pairs of which a case is missing."""
    orders_, units = marginals.shape
    place = np.empty((orders_, units), int)
    for row, order in enumerate(orders):
        place[row, order] = np.arange(units)
    seen = ~np.isnan(marginals)
    filled = np.where(seen, marginals, 0.0)
    later = (place[:, :, None] > place[:, None, :]).astype(float)  # [orders, i, j]: j before i
    with np.errstate(invalid="ignore", divide="ignore"):
        means, variances = [], []
        for case in (later, 1.0 - later):
            case = case * seen[:, :, None]
            count = case.sum(0)
            mean = np.einsum("oij,oi->ij", case, filled) / count
            square = np.einsum("oij,oi->ij", case, filled**2) / count - mean**2
            means.append(mean)
            variances.append(np.maximum(square, 0.0) / np.maximum(count - 1, 1))
        difference, variance = means[0] - means[1], variances[0] + variances[1]
    usable = np.isfinite(difference) & np.isfinite(difference.T) & ~np.eye(units, dtype=bool)
    difference, variance = np.where(usable, difference, 0.0), np.where(usable, variance, 0.0)
    one_way = 1.5 * (difference - difference.sum(1, keepdims=True) / (units + 1))
    both, error = (one_way + one_way.T) / 2, 1.5 * np.sqrt(variance + variance.T) / 2
    return np.where(usable, both, 0.0), error


def _named(pairs: np.ndarray, names: Sequence[str], low: str) -> dict:
    """As `Scores.interactions`: only of pairs that are not 0, each once."""
    found = {}
    for i, j in zip(*np.nonzero(np.triu(pairs, 1)), strict=True):
        found.setdefault(names[i], {})[names[j]] = {low: {low: float(pairs[i, j])}}
    return found
