"""What the scores that look at quantized matrices ask about: units, formats, and the quantizer that makes them."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation.candidates import Candidates
from lq.importance.units import Unit
from lq.importance.weights import weight_at
from lq.models.matrices import block_of, matrices, model_shapes
from lq.models.source import ParameterSource
from lq.numerics.segmented import is_packed
from lq.numerics.spec import QuantSpec, smallest_first
from lq.quantizers import QUANTIZERS, Recipe, quantized_source
from lq.quantizers.apply import read_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedOptions:
    """Raises UserError for widths, formats and methods that do not exist."""

    unit: Unit = "matrix"
    bits: list[int] = dataclasses.field(default_factory=lambda: [2, 3, 4])
    group_size: int | list[int] | None = 128  # one, or several to choose from
    symmetric: bool = False
    scale_dtype: str = "bfloat16"
    zero_dtype: str | None = None
    by_energy: bool = False  # groups of channels in the order of their energy
    method: str = "rtn"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the method
    batch_size: int = 8  # windows per device step

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size}; write 1 or more")
        if len(set(self.bits)) != len(self.bits) or not self.bits:
            raise UserError(f"bits: {self.bits}; write each width once, such as [2, 3, 4]")
        if len(set(self.group_sizes)) != len(self.group_sizes) or not self.group_sizes:
            raise UserError(f"group_size: {self.group_size}; write each once, such as [64, 128]")
        _ = self.specs, self.recipe

    @property
    def group_sizes(self) -> list[int | None]:
        return [*self.group_size] if isinstance(self.group_size, list) else [self.group_size]

    @property
    def specs(self) -> list[QuantSpec]:
        """What every matrix may become, smallest first."""
        same: dict[str, Any] = {
            name: getattr(self, name) for name in ("symmetric", "scale_dtype", "zero_dtype", "by_energy")
        }
        return smallest_first(
            QuantSpec(bits=bits, group_size=size, **same)
            for bits, size in itertools.product(self.bits, self.group_sizes)
        )

    @property
    def recipe(self) -> Recipe:
        return Recipe(method=self.method, options=QUANTIZERS.options(self.method, self.options))


def quantized_matrices(
    source: ParameterSource, options: QuantizedOptions, windows: Windows, metric: str
) -> Iterator[list[dict[str, Array]]]:
    """Block by block, its matrices by full path as each of `options.specs` leaves them: dequantized, float32.

    Raises UserError for a recipe behind which the matrices stand for others than the original's, and, naming the
    matrix, for one that is packed already or not finite.
    """
    recipe, batch_size = options.recipe, options.batch_size
    if recipe.scaling is not None:
        raise UserError(
            f"metric {metric}: {recipe.name} scales channels, and its matrices no longer stand for the original ones; "
            "write options scale: false, or another method"
        )
    paths = list(matrices(source.config))
    models = quantized_sources(source, options.specs, recipe, windows, batch_size)
    for index in range(source.config.num_blocks):
        original, mine = source.block(index), [path for path in paths if block_of(path) == index]
        for path in mine:
            weight_at(original, path, metric)
        blocks = [model.block(index) for model in models]
        yield [{path: read_matrix(block, path).dequantize() for path in mine} for block in blocks]


def candidates_of(
    source: ParameterSource,
    specs: Sequence[QuantSpec],
    recipe: Recipe,
    windows: Windows,
    batch_size: int,
    *,
    tables: bool = False,
) -> Candidates:
    """The model quantized uniformly at each of `specs`, embedding and head where `tables`, as options.

    Raises UserError, before anything is quantized, for a packed model and a recipe that changes more than matrices.
    """
    if recipe.scaling is not None or recipe.bias_correction:
        raise UserError(
            f"candidates: {recipe.name} changes more than matrices, of which alone options are made; leave out what "
            "scales channels or corrects biases, as awq does unless its options have scale: false"
        )
    quantized = quantized_sources(source, specs, recipe, windows, batch_size, tables=tables)
    return Candidates.of(source, quantized, tables=tables)


def quantized_sources(
    source: ParameterSource,
    specs: Sequence[QuantSpec],
    recipe: Recipe,
    windows: Windows,
    batch_size: int,
    *,
    tables: bool = False,
) -> list[ParameterSource]:
    """The model quantized uniformly at each of `specs`, embedding and head where `tables`, as it is read.

    Raises UserError for a model that is packed.
    """
    if source.config.num_blocks and any(map(is_packed, jax.tree.leaves(source.block(0), is_leaf=is_packed))):
        raise UserError("block_0 is packed already, and options are made from dense weights; give the original model")
    text, paths = windows if recipe.calibrated else None, (model_shapes if tables else matrices)(source.config)
    return [quantized_source(source, dict.fromkeys(paths, spec), recipe, text, batch_size=batch_size) for spec in specs]


def scores_from(
    units: Mapping[str, list[str]], specs: Sequence[QuantSpec], losses: Mapping[str, Float[np.ndarray, " options"]]
) -> dict:
    """`values` and `costs` of units from what each of their matrices loses at every spec, smallest first.

    A unit loses what its matrices lose together. Its score is what it gains from the smallest to the largest spec; of
    one spec alone, what it loses.
    """
    costs = {}
    for unit, paths in units.items():
        lost = np.sum([losses[path] for path in paths], axis=0)
        costs[unit] = {str(spec): float(loss) for spec, loss in zip(specs, lost, strict=True)}
    return {"values": values_of(costs), "costs": costs}


def values_of(costs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What every unit gains from the first, smallest option to the last; of one option alone, what it loses."""
    found = {}
    for unit, of_unit in costs.items():
        first, *others = of_unit.values()
        found[unit] = first - others[-1] if others else first
    return found
