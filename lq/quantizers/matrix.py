"""One matrix on the statistics of its inputs: these checked and prepared, the matrix quantized, its error measured.

For every matrix there is, in a block or a table: what is not finite is refused by name, what could not be used as it is
is told, and the error of the output is reported wherever the statistics give it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.numerics.segmented import Packed
from lq.numerics.sharded import to_host
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import finite, quantize_leaf
from lq.quantizers.errors import output_error
from lq.quantizers.experts import Shortage, fill_in
from lq.quantizers.gptq import GPTQFactor
from lq.quantizers.placement import Place, back, beside
from lq.quantizers.recipe import Recipe

REPORTED = 512  # output channels of a matrix whose error is measured for the user
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class MeasuredInput:
    """What is known of one tensor that matrices are applied to."""

    stats: InputStats | None  # None: the recipe needs nothing
    prepared: Any  # what the method's `prepare` made of them, for every matrix that reads the tensor

    @classmethod
    def of(cls, stats: InputStats, where: str, channels: int, recipe: Recipe, note: Note) -> "MeasuredInput":
        """Of statistics, those of starved experts filled up.

        Args:
          stats: of an input of `channels`, or of a stack of experts' `[E, ...]`.
          where: the path of a matrix that reads it, for messages.
          recipe: whose method they are for.
          note: takes lines for the user.

        Raises:
          UserError: statistics that are not finite.
        """
        check_finite(stats, where)
        if stats.tokens.ndim:
            shortage = Shortage.of(stats, channels, moment=stats.hessian is not None)
            shortage.tell(where, "what they lack is filled up from all experts", note)
            stats = fill_in(stats, shortage)
        prepare = recipe.quantizer.prepare
        prepared = stats if prepare is None else prepare(stats, recipe.options)
        if isinstance(prepared, GPTQFactor):
            _tell_of_damping(prepared, stats, where, recipe.options.damping, note)
        return cls(stats, prepared)

    def quantize(
        self, weight: jax.Array, spec: QuantSpec, recipe: Recipe, place: Place
    ) -> tuple[Packed, dict[str, float]]:
        """The packed matrix, and what was measured of it. `place` lays its weight out over devices meanwhile."""
        placed = place(weight)
        stats, prepared = (beside(tree, placed) for tree in (self.stats, self.prepared))
        tensor, found = quantize_leaf(placed, stats, prepared, spec, recipe), {}
        if stats is not None and stats.hessian is not None:
            found["output error"] = float(output_error(placed, tensor.dequantize(), stats, REPORTED).mean())
        return back(tensor, weight), found


NOTHING = MeasuredInput(None, None)


def check_finite(stats: InputStats, where: str) -> None:
    """Raises UserError, naming the matrix, unless all statistics are finite."""
    if not all(bool(finite(leaf)) for leaf in jax.tree.leaves(stats)):
        raise UserError(f"{where}: its calibration inputs are NaN or infinite; the model or the states are damaged")


def _tell_of_damping(factor: GPTQFactor, stats: InputStats, where: str, asked: float, note: Note) -> None:
    """Says so where a Hessian had to be damped more than was asked for."""
    damping = np.atleast_1d(to_host(factor.damping))
    energy = np.atleast_2d(np.diagonal(to_host(stats.hessian), axis1=-2, axis2=-1))
    share = damping * np.count_nonzero(energy, axis=-1) / np.maximum(energy.sum(-1), np.finfo(np.float32).tiny)
    if not np.isfinite(damping).all():
        note(f"{where}: {int((~np.isfinite(damping)).sum())} Hessians could not be factored; rounded to nearest")
    elif (share > 2 * asked).any():
        note(f"{where}: a Hessian was not positive definite; damped by {share.max():.2g} of its mean diagonal")
