"""Predicted damage: the KL divergence that rounding costs, to second order, from a few backward passes.

    KL(original || model with W + dW)  =  1/2 E_y <G_y, dW>^2  +  third order,      per window

G_y is the gradient of ln p(y) by W, y labels drawn from the model's own prediction, one per position, and the sum over
positions is inside the square: what tokens do to each other through attention is in it, where a diagonal Fisher
information has none of it. One backward pass for every draw of labels prices all units at all options; with R windows
and draws in all, a price is off by a share of sqrt(2 / R).

A *segment* is a run of input channels of one matrix, those of most energy first (`QuantSpec.widths`). Where every
weight is rounded for itself its dW are the rows of its channels. A quantizer that makes up for errors, GPTQ, changes
all channels behind the one that it rounds, and what a segment's width costs is all that its rounding causes. With
H + damping = R R^T, the channels in the order of the sweep, and C = R^T (W - Q) (`lq.quantizers.sweep`),

    W - Q  =  sum over channels k of  column k of R^-T  times  row k of C,

where row k of C is R_kk times what was left over when channel k was rounded. So its part of <G, dW> is row k of R^-1 G
times row k of C: a triangular solve for each matrix and window. The parts of a matrix sum to the whole.

With unit gain (`lq.quantizers.gain`) the scales of an output channel n give back what its outputs lose of their size,

    Q' = c Q,    c = <W_n, W_n> / <W_n, Q_n>    in H + damping I,    so that    W - Q' = c (W - Q) - (c - 1) W,

and c depends on all segments at once. But with G' = G - H W_n <G_n, W_n> / <W_n, W_n>, the gradient without what gains
see to, <G', W> = 0 and <G, W - Q'> = c <G', W - Q>: the errors are those without gain, and of a segment c is what it is
where that segment alone is rounded. Plain rounding has a gain for every group, within its segment.

Prices of one segment hold whatever widths the others get where what is left over goes by the width of its own channel.
That is so of rounding for itself, and nearly so of GPTQ where the range of a group is found when the sweep comes to it
(`lq.quantizers.runs`). With ranges of the original weights it is not: what the last channels have to make up for leaves
them, and a plan priced so was worse than one width for all.
"""

import dataclasses
import functools
import operator
from typing import Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lq.calibration.data import Windows
from lq.calibration.statistics import HIGHEST, InputStats
from lq.calibration.stream import batches
from lq.calibration.taps import block_inputs, input_statistics
from lq.errors import UserError
from lq.importance.backward import Backward, Gradients, WindowGradients, split_block
from lq.importance.perturbations import Perturbations, slopes
from lq.importance.quantized import QuantizedOptions, values_of
from lq.importance.units import Unit, segment_name, units_of
from lq.models.matrices import matrices
from lq.models.source import ParameterSource
from lq.quantizers.apply import quantize_matrix
from lq.quantizers.gain import MOST
from lq.quantizers.gptq import GPTQFactor, GPTQOptions
from lq.quantizers.runs import round_widths, sweep_widths


def check_labels(draws: int, seed: int) -> None:
    """Raises UserError for a number of draws of labels, or a seed of theirs, that cannot be."""
    if draws < 1:
        raise UserError(f"draws: {draws}; write 1 or more")
    if not 0 <= seed < 1 << 31:
        raise UserError(f"seed: {seed}; write a whole number from 0 to {(1 << 31) - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedOptions(QuantizedOptions):
    # One more than other scores price: wider than the field it replaces, which a type checker cannot know to be safe.
    unit: Literal["block", "part", "group", "matrix", "segment"] = "matrix"  # type: ignore[assignment]
    segment_channels: int = 128  # of a segment; a matrix that they do not divide is one unit
    draws: int = 8  # of labels, a backward pass each
    seed: int = 0  # of the labels

    def __post_init__(self):
        super().__post_init__()
        check_labels(self.draws, self.seed)
        if self.unit == "segment":
            self._check_segments()

    def _check_segments(self):
        if self.method not in ("rtn", "gptq"):
            raise UserError(f"unit: segment, but no segments of {self.method} are priced; write method rtn or gptq")
        method = self.recipe.options
        if isinstance(method, GPTQOptions) and (method.static_groups or not method.act_order):
            raise UserError(
                "unit: segment, but with ranges of the original weights what later segments make up for leaves them, "
                "and prices at one width do not hold for mixtures; leave out static_groups and act_order"
            )
        if self.by_energy:
            raise UserError("unit: segment, whose groups are by energy in any case; leave out by_energy")
        if len(self.group_sizes) > 1 or self.group_sizes[0] is None:
            raise UserError("group_size: the segments of a matrix share one, and hold whole groups; write one number")
        if self.segment_channels < 1 or self.segment_channels % self.group_sizes[0]:
            size = self.group_sizes[0]
            raise UserError(
                f"segment_channels: {self.segment_channels}, in groups of {size}; write {size} or a multiple of it"
            )

    def segments(self, shape: tuple[int, ...]) -> int:
        """How many segments a matrix is cut into."""
        count = 1 if shape[-2] % self.segment_channels else shape[-2] // self.segment_channels
        return count if count > 1 and self.specs[0].segmentable(shape, count) else 1


def predicted_kl(source: ParameterSource, windows: Windows, options: PredictedOptions) -> dict:
    """What the model loses with one unit alone at every width: KL divergence, predicted from gradients."""
    backward = Backward(
        source, windows, loss="sampled", seed=options.seed, draws=options.draws, batch_size=options.batch_size
    )
    errors = UnitErrors(source, windows, options)
    products, gradients = errors.products(backward, source)
    per_window = gradients.tokens / len(gradients.losses)
    names, costs = [str(spec) for spec in options.specs], {}
    for unit, of_unit in products.items():
        squares = 0.5 * np.square(of_unit).mean(0) / per_window
        costs[unit] = dict(zip(names, squares.tolist(), strict=True))
    return {"values": values_of(costs), "costs": costs, "passes": backward.passes}


class UnitErrors:
    """What rounding a unit at each option does to its matrices, dW = Q(W) - W, in products with gradients."""

    def __init__(self, source: ParameterSource, windows: Windows, options: PredictedOptions):
        self._source, self._windows, self._options = source, windows, options
        self._perturbations = None if options.unit == "segment" else Perturbations(source, windows, options)

    def products(
        self, backward: Backward, point: ParameterSource
    ) -> tuple[dict[str, Float[np.ndarray, "windows options"]], Gradients]:
        """<G, dW> of every unit, window and option, G at `point`; and the gradients' losses. float64.

        The errors of segments are those on what the original's matrices make of the states at `point`, where the
        quantizer goes by inputs; those of other units on what the recipe says, the same at any point.
        """
        options = self._options
        if self._perturbations is None:
            errors = SegmentErrors(self._source, self._windows, options, backward)
            found = backward.gradients(point, segment_slopes, errors)
            units = _segment_units(self._source, options)
        else:
            found = backward.gradients(point, slopes, self._perturbations.errors)
            whole = units_of(self._source.config, cast(Unit, options.unit))
            units = {unit: [(path, None) for path in paths] for unit, paths in whole.items()}
        # By matrix, [windows and draws, options], and a last axis for segments.
        by_path = {f"block_{i}/{path}": a for i, block in enumerate(found.blocks) for path, a in block.items()}
        return {
            unit: np.sum([by_path[p] if place is None else by_path[p][..., place] for p, place in members], axis=0)
            for unit, members in units.items()
        }, found


def _segment_units(source: ParameterSource, options: PredictedOptions) -> dict[str, list[tuple[str, int | None]]]:
    """Segments, and whole matrices that cannot be cut: of each the matrix and its place on the last axis."""
    found: dict[str, list[tuple[str, int | None]]] = {}
    for path, shape in matrices(source.config).items():
        count = options.segments(shape)
        for index in range(count):
            found[segment_name(path, index, count) if count > 1 else path] = [(path, index)]
    return found


@flax.struct.dataclass
class Attributed:
    """The errors Q - W of one matrix at every option, as a sum over channels; see the module's docstring."""

    order: Int[Array, " K"]  # of the channels
    upper: Float[Array, "K K"] | None  # R; None: the identity
    parts: Float[Array, "options K N"]  # -C; with unit gain each segment's times the gain of that segment alone
    segment: Float[Array, "K segments"]  # one where the channel is in the segment
    # With unit gain: W, and H W over <W, W> of every output channel, in H + damping I.
    gain: tuple[Float[Array, "K N"], Float[Array, "K N"]] | None = None


class SegmentErrors:
    """Errors of the matrices of a block, on what its original matrices make of the states at the model at hand."""

    def __init__(self, source: ParameterSource, windows: Windows, options: PredictedOptions, backward: Backward):
        self._source, self._options, self._backward = source, options, backward
        self._rows = batches(windows.tokens, options.batch_size)
        self._needs = frozenset({"hessian" if options.method == "gptq" else "square"})

    def __call__(self, index: int) -> dict[str, Attributed | Array]:
        """By path within the block; of a matrix that is not cut Q - W at every option."""
        config, found = self._source.config, {}
        kind, params = config.kinds[index], self._source.block(index, jnp.float32)
        places = block_inputs(config, kind)
        every = tuple(range(len(places)))
        totals = [
            input_statistics(config, kind, params, h, tokens, None, every, self._needs)
            for tokens, h in zip(self._rows, self._backward.inputs, strict=True)
        ]
        kernels, _ = split_block(config, kind, params)
        for i, place in enumerate(places):
            stats = functools.reduce(operator.add, [total[i] for total in totals])
            prepare = self._options.recipe.quantizer.prepare
            prepared = stats if prepare is None else prepare(stats, self._options.recipe.options)
            for path in place.readers:
                found[path] = self.of_matrix(self._options, kernels[path], stats, prepared)
        return found

    @staticmethod
    def of_matrix(options: PredictedOptions, weight: Array, stats: InputStats, prepared) -> Attributed | Array:
        """Of one matrix; `prepared` is what the quantizer's `prepare` made of the statistics."""
        specs = options.specs
        count = options.segments(weight.shape)
        if count == 1:
            made = [quantize_matrix(weight, prepared, spec, options.method, options.recipe.options) for spec in specs]
            return jnp.stack([tensor.dequantize() - weight for tensor in made])
        method, cuts = options.recipe.options, [dataclasses.replace(spec, by_energy=True) for spec in specs]
        of_outputs = isinstance(prepared, GPTQFactor) and method.unit_gain
        method = dataclasses.replace(method, unit_gain=False) if of_outputs else method
        if isinstance(prepared, GPTQFactor):
            found = [sweep_widths(weight, prepared, spec, method) for spec in cuts]
            order, upper = prepared.order, prepared.upper
        else:
            found = [round_widths(weight, stats.square, spec, method) for spec in cuts]
            order, upper = jnp.arange(len(weight)), None
        permutation = found[0][0]  # the order of energy, whatever the width
        differences = jnp.stack([difference for *_, difference in found])
        return _attributed(order, upper, differences, permutation, weight if of_outputs else None, count)


@functools.partial(jax.jit, static_argnames="count")
def _attributed(order, upper, difference: Float[Array, "options K N"], permutation, weight, count: int) -> Attributed:
    K = len(order)
    run = jnp.zeros(K, jnp.int32).at[permutation].set(jnp.arange(K) // (K // count))
    parts = -difference[:, order]
    parts = parts if upper is None else jnp.einsum("jk,ojn->okn", upper, parts, precision=HIGHEST)
    gain, segment = None, jax.nn.one_hot(run[order], count)
    if weight is not None:
        weight = weight[order]
        through = jnp.matmul(upper.T, weight, precision=HIGHEST)
        energy = jnp.sum(through**2, axis=0)
        energy = jnp.where(energy > 0, energy, 1.0)
        gain = weight, jnp.matmul(upper, through, precision=HIGHEST) / energy
        left = 1.0 + jnp.einsum("kn,okn,ks->osn", through, parts, segment, precision=HIGHEST) / energy
        parts = parts * jnp.einsum("osn,ks->okn", 1.0 / jnp.clip(left, 1.0 / MOST, MOST), segment, precision=HIGHEST)
    return Attributed(order, upper, parts, segment, gain)


def segment_slopes(found: WindowGradients, errors: dict[str, Attributed | Array]) -> dict[str, Array]:
    """<G, dW> of every option and segment, `[options, segments]`, by matrix. A `Reduce`."""
    out = {}
    for path, error in errors.items():
        gradient = found.kernel_gradients[path]
        if not isinstance(error, Attributed):
            out[path] = jnp.sum(gradient * error, axis=tuple(range(1, error.ndim)))[:, None]
            continue
        gradient = gradient[error.order]
        if error.gain is not None:
            weight, image = error.gain
            gradient = gradient - image * jnp.sum(gradient * weight, axis=0)
        if error.upper is not None:
            gradient = jax.scipy.linalg.solve_triangular(error.upper, gradient)
        of_channel = jnp.einsum("kn,okn->ok", gradient, error.parts, precision=HIGHEST)
        out[path] = jnp.matmul(of_channel, error.segment, precision=HIGHEST)
    return out
