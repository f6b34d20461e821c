"""What pairs of units lose beyond the sum of both: from scores to `Interactions`, and their projection."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from lq.allocation.problem import Interactions, Problem
from lq.importance.scores import Scores
from lq.importance.units import members
from lq.numerics.spec import QuantSpec


def interactions_of(scores: Scores, units: Sequence[str], options: Sequence[QuantSpec]) -> Interactions | None:
    """The pairs of `units` for which the scores have interactions; 0 for options without. None where there are none.

    Args:
      scores: with `interactions`.
      units, options: in the order of the problem.
    """
    place, column = _places(units, options)
    terms: dict[tuple[int, int], np.ndarray] = {}
    for unit, other, mine, its, value in _entries(scores):
        if unit in place and other in place and mine in column and its in column:
            term = terms.setdefault((place[unit], place[other]), np.zeros((len(options), len(options))))
            term[column[mine], column[its]] = value
    terms = {pair: term for pair, term in terms.items() if term.any()}
    return Interactions(pairs=np.array([*terms]), terms=np.array([*terms.values()])) if terms else None


def _places(units: Sequence[str], options: Sequence[QuantSpec]) -> tuple[dict[str, int], dict[str, int]]:
    """Row of every unit, column of every option as scores name it."""
    return {unit: i for i, unit in enumerate(units)}, {str(option): i for i, option in enumerate(options)}


def _entries(scores: Scores) -> Iterator[tuple[str, str, str, str, float]]:
    """Unit, another, the option of each, and what they lose together beyond the sum of both."""
    for unit, others in scores.interactions.items():
        for other, table in others.items():
            for mine, row in table.items():
                for its, value in row.items():
                    yield unit, other, mine, its, value


def costs_beside(
    scores: Scores, units: Sequence[str], options: Sequence[QuantSpec], fixed: Mapping[str, QuantSpec | None]
) -> Float[np.ndarray, "units options"]:
    """What every option of `units` loses beyond its cost beside units that are decided already.

    Args:
      scores: with `interactions`.
      units, options: in the order of the problem.
      fixed: matrix -> what a pin makes it. Of a unit that it decides in part, by several formats, or partly leaves
        dense, every format counts by its share of the weights.
    """
    decided = {unit: _decided_shares(members(unit, scores.shapes), scores.shapes, fixed) for unit in scores.values}
    place, column = _places(units, options)
    found = np.zeros((len(units), len(options)))
    for unit, other, mine, its, value in _entries(scores):
        if unit in place and mine in column:
            found[place[unit], column[mine]] += decided[other].get(its, 0.0) * value
        if other in place and its in column:
            found[place[other], column[its]] += decided[unit].get(mine, 0.0) * value
    return found


def _decided_shares(
    paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, QuantSpec | None]
) -> dict[str, float]:
    """Format -> the share of the weights of `paths` that a pin gives it."""
    found: dict[str, float] = {}
    for path in paths:
        if (spec := fixed.get(path)) is not None:
            found[str(spec)] = found.get(str(spec), 0.0) + math.prod(shapes[path])
    return {spec: weights / sum(math.prod(shapes[path]) for path in paths) for spec, weights in found.items()}


def psd_projected(problem: Problem) -> Problem:
    """The problem with the nearest objective that is convex, as CLADO has it (arXiv 2307.05657).

    Written as x^T G x / 2 over the indicators x of all options, with twice the costs on the diagonal of G, G loses its
    negative eigenvalues: measured pairs are noisy, and the noise is as often below as above. What arises between the
    options of one unit is dropped, since it has one of them; pairs arise between all units.
    """
    units, options = problem.cost.shape
    G = np.zeros((units, options, units, options))
    offered = problem.offered
    each, widths = np.arange(units)[:, None], np.arange(options)
    G[each, widths, each, widths] = 2 * np.where(offered, problem.cost, 0.0)
    if problem.interactions is not None:
        for (a, b), term in zip(problem.interactions.pairs, problem.interactions.terms, strict=True):
            masked = np.where(offered[a][:, None] & offered[b], term, 0.0)
            G[a, :, b, :], G[b, :, a, :] = masked, masked.T
    values, vectors = np.linalg.eigh(G.reshape(units * options, -1))
    convex = ((vectors * np.maximum(values, 0.0)) @ vectors.T).reshape(G.shape)
    cost = np.where(offered, convex[each, widths, each, widths] / 2, np.inf)
    pairs = np.array([*itertools.combinations(range(units), 2)], int).reshape(-1, 2)
    terms = np.array([convex[a, :, b, :] for a, b in pairs]).reshape(-1, options, options)
    return dataclasses.replace(problem, cost=cost, interactions=Interactions(pairs=pairs, terms=terms))
