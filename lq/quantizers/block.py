"""One block quantized on its calibration states: statistics, codes, what is done about their errors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.statistics import SAMPLE_ROWS, InputStats
from lq.calibration.stream import through_block
from lq.calibration.taps import block_inputs, input_statistics
from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import Packed, is_packed
from lq.numerics.sharded import rows_apart
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import check_packed, check_weight, read_bias, read_matrix, with_bias, with_matrix
from lq.quantizers.bias import bias_correction
from lq.quantizers.channel_lines import with_storable_gains
from lq.quantizers.experts import Shortage
from lq.quantizers.matrix import NOTHING, MeasuredInput, Note, check_finite
from lq.quantizers.placement import Place, back, like, over_local_devices
from lq.quantizers.recipe import Recipe
from lq.quantizers.reconstruct import BlockFunction
from lq.quantizers.registry import SCALINGS


@dataclasses.dataclass(frozen=True)
class CalibratedBlock:
    """A block and the states it is calibrated on."""

    config: ModelConfig
    kind: BlockKind
    name: str  # "block_3"
    params: Params  # dense, float32
    tokens: list[np.ndarray]  # per batch [B, S]
    states: list[np.ndarray]  # per batch [B, S, D]: the block's input
    dtype: Any = jnp.bfloat16  # what stays dense is stored in

    def path(self, within: str) -> str:
        """The full path of a matrix of this block."""
        return f"{self.name}/{within}"

    def outputs(self, params: Params, states: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """The states after the block with these parameters."""
        return through_block(self.config, self.kind, params, self.tokens, self.states if states is None else states)

    def statistics(
        self, params: Params, which: tuple[int, ...], needs: frozenset[str], weights: list[Any] | None = None
    ) -> list[InputStats]:
        """Statistics of the inputs `which` of `block_inputs`, over all batches, the block having these parameters."""
        rows = max(1, SAMPLE_ROWS // len(self.tokens))
        totals: list[InputStats] | None = None
        for i, pair in enumerate(zip(self.tokens, self.states, strict=True)):
            weight, (tokens, h) = None if weights is None else weights[i], map(rows_apart, pair)
            found = input_statistics(self.config, self.kind, params, h, tokens, weight, which, needs, rows)
            totals = found if totals is None else [total + new for total, new in zip(totals, found, strict=True)]
        return totals or []


def dense(params: Params) -> Params:
    """Every leaf float32, packed ones dequantized: one tree structure, and one compilation, whatever the specs."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf.astype(jnp.float32), params, is_leaf=is_packed
    )


def quantize_block(
    block: CalibratedBlock,
    specs: Mapping[str, QuantSpec],
    recipe: Recipe,
    targets: list[np.ndarray] | None,
    *,
    place: Place | None = None,
    note: Note = lambda line: None,
) -> tuple[Params, dict[str, dict[str, float]]]:
    """Packs the matrices of a block.

    Args:
      block: what is quantized, and on which states.
      specs: path within the block -> spec; the other matrices stay dense.
      recipe: method, options and what goes with it.
      targets: the original block's outputs, for methods that reconstruct blocks.
      place: lays a weight out over devices while it is quantized; those of this process when None.
      note: takes lines for the user.

    Returns:
      The parameters, what stays dense in float32; and per matrix what was measured.
    """
    report: dict[str, dict[str, float]] = {path: {} for path in specs}
    if not specs:
        return block.params, report
    for path in specs:
        check_weight(read_matrix(block.params, block.path(path)), block.path(path))
    place = place or over_local_devices()
    if recipe.scaling is not None:
        block = _scaled(block, specs, recipe, note)
    if recipe.reconstructs_blocks:
        tensors = _reconstructed(block, specs, recipe, targets, report, place, note)
    else:
        tensors = _matrix_by_matrix(block, specs, recipe, report, place, note)
    params = block.params
    for path, tensor in tensors.items():
        params = with_matrix(params, block.path(path), check_packed(tensor, block.path(path)))
    if recipe.bias_correction:
        params = _with_corrected_biases(block, params, tuple(specs))
    return params, report


def _scaled(block: CalibratedBlock, specs, recipe: Recipe, note: Note) -> CalibratedBlock:
    """The block with channel scales folded in, which computes the same."""
    function = SCALINGS[recipe.scaling or ""].function
    where, data = (block.config, block.kind), (block.params, block.states, block.tokens)
    params, _ = function(*where, *data, specs, recipe.scaling_options, block.name, note)
    params = with_storable_gains(*where, params, block.dtype)
    return dataclasses.replace(block, params=params)


def _reconstructed(
    block: CalibratedBlock, specs, recipe: Recipe, targets, report, place: Place, note: Note
) -> dict[str, Packed]:
    """All matrices found together, so that the block's output is near `targets`."""
    reconstruct = recipe.quantizer.block
    if reconstruct is None or targets is None:
        raise ValueError(f"{recipe.method} reconstructs no blocks, or has no targets")
    apply = BlockFunction(block.config, block.kind)
    states, targets_of_all = np.concatenate(block.states), np.concatenate(targets)
    if not (np.isfinite(states).all() and np.isfinite(targets_of_all).all()):
        raise UserError(
            f"{block.name}: its calibration states are NaN or infinite; the model is damaged, give an intact one"
        )
    held = _starved_experts(block, specs, note)
    data = (block.params, states, targets_of_all)
    found, outcome = reconstruct(apply, *data, specs, recipe.options, place=place, held=held)
    tensors: dict[str, Packed] = {}
    for path, (codes, scales, zeros) in found.items():
        report[path]["of rounding's error"] = outcome.after / outcome.before if outcome.before else 1.0
        tensor = QTensor.from_codes(codes, scales, zeros, specs[path], outcome.residuals.get(path))
        tensors[path] = back(tensor, read_matrix(block.params, block.path(path)))
    return tensors


def _starved_experts(block: CalibratedBlock, specs, note: Note) -> dict[str, np.ndarray]:
    """Of every stack of experts, which saw too few tokens to learn from: bool `[E]`, by path.

    As many as there are channels are asked for: of fewer a rounding can be learned that suits just these.
    """
    found = {}
    for i, one in enumerate(block_inputs(block.config, block.kind)):
        readers = [path for path in one.readers if path in specs]
        if one.experts is None or not readers:
            continue
        (stats,) = block.statistics(block.params, (i,), frozenset())
        where = block.path(readers[0])
        shortage = Shortage.of(stats, read_matrix(block.params, where).shape[-2], moment=True)
        shortage.tell(where, "they are not learned, but keep their start", note)
        found |= dict.fromkeys(readers, shortage.starved)
    return found


def _matrix_by_matrix(
    block: CalibratedBlock, specs, recipe: Recipe, report, place: Place, note: Note
) -> dict[str, Packed]:
    """In true-sequential order every input is measured with the matrices before it quantized already."""
    tensors: dict[str, Packed] = {}
    inputs = block_inputs(block.config, block.kind)
    wanted = [i for i, one in enumerate(inputs) if any(path in specs for path in one.readers)]
    weights = _token_weights(block, recipe)
    current = block.params
    for stage in [(i,) for i in wanted] if recipe.true_sequential else [tuple(wanted)]:
        measured = block.statistics(current, stage, recipe.needs, weights) if recipe.needs else [None] * len(stage)
        for i, stats in zip(stage, measured, strict=True):
            where = block.path(inputs[i].readers[0])
            channels = read_matrix(block.params, where).shape[-2]
            of_input = NOTHING if stats is None else MeasuredInput.of(stats, where, channels, recipe, note)
            for path in inputs[i].readers:
                if path in specs:
                    weight = read_matrix(block.params, block.path(path))
                    tensor, found = of_input.quantize(weight, specs[path], recipe.of_matrix(path), place)
                    report[path] |= found
                    tensors[path] = tensor
                    current = with_matrix(current, block.path(path), like(tensor.dequantize(), weight))
    return tensors


def _token_weights(block: CalibratedBlock, recipe: Recipe) -> list[Any] | None:
    """How much each token counts, per batch `[B, S]`, where the method weighs tokens."""
    weigh = recipe.quantizer.token_weights
    if weigh is None:
        return None
    pairs = zip(block.states, block.tokens, strict=True)
    return [weigh(block.config, block.kind, block.params, h, tokens, recipe.options) for h, tokens in pairs]


def _with_corrected_biases(block: CalibratedBlock, packed: Params, paths: tuple[str, ...]) -> Params:
    """`packed` with biases that undo the mean error of every matrix on the states it now sees (closed form)."""
    for i, one in enumerate(block_inputs(block.config, block.kind)):
        readers = [path for path in one.readers if path in paths and one.experts is None]
        if not readers:
            continue
        (stats,) = block.statistics(dense(packed), (i,), frozenset({"total"}))
        check_finite(stats, block.path(readers[0]))
        for path in readers:
            full = block.path(path)
            tensor = read_matrix(packed, full)
            shift = bias_correction(read_matrix(block.params, full), tensor.dequantize(), stats)
            packed = with_bias(packed, full, read_bias(packed, full) + shift)
    return packed
