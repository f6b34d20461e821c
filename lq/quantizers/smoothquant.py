"""SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4): activations and weights made equally hard, in closed form.

    s_c = max|X_c|^a / max|W_c|^(1 - a)

over the tokens X of a calibration set and all output channels of all readers W of a channel line
(`lq.quantizers.channel_lines`), a router aside. It was made for quantizing activations too: with a = 1/2 both sides get
the range sqrt(max|X_c| max|W_c|). The paper rescales after norms; `lines="all"` goes on to the lines between matrices.
For an expert that saw too few tokens (`lq.quantizers.experts`) the tokens of all experts are looked at.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.source import Params
from lq.numerics.sharded import to_host
from lq.numerics.spec import QuantSpec
from lq.quantizers.channel_lines import Line, fold, in_float32, leaf_at
from lq.quantizers.experts import Shortage, fill_in
from lq.quantizers.line_inputs import line_statistics

SMALLEST = 1e-5  # of a scale, and of the largest weight of a channel


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuantOptions:
    """How much is moved from activations to weights. Raises UserError for a strength outside [0, 1]."""

    strength: float = 0.5  # a
    lines: Literal["norms", "all"] = "norms"

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise UserError(f"smoothquant: option strength: {self.strength}; write a number from 0 to 1")


def smoothing_scale(
    peak: Float[np.ndarray, "... channels"], weight_peak: Float[np.ndarray, "... channels"], strength: float
) -> Float[np.ndarray, "... channels"]:
    """s of equation 4, float64, from max|X_c| and max|W_c|; no less than 1e-5, as in the reference code."""
    weight_peak = np.maximum(np.asarray(weight_peak, np.float64), SMALLEST)
    return np.maximum(np.asarray(peak, np.float64) ** strength / weight_peak ** (1 - strength), SMALLEST)


def smooth_block(
    config: ModelConfig,
    kind: BlockKind,
    block_params: Params,
    hidden: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    specs: Mapping[str, QuantSpec],
    options: SmoothQuantOptions,
    name: str = "block",
    note: Callable[[str], None] = lambda line: None,
) -> tuple[Params, dict[Line, np.ndarray]]:
    """SmoothQuant's scales of every line of a block, from the largest activations and weights, folded.

    Args:
      config, kind: of the block.
      block_params: dense.
      hidden: inputs of the block `[B, S, D]`, one array a batch.
      tokens: int32 `[B, S]` of each batch, without padding.
      specs: by path within the block, of the matrices that will be quantized. A line none of whose readers is there
        is left alone.
      options: see there.
      name: of the block, in errors.
      note: takes lines for the user.

    Returns:
      The block's parameters in float32, computing what `block_params` do, and the scale of each line, float32 of its
      `shape`.

    Raises:
      UserError: the inputs of a matrix are not finite.
      ValueError: a packed matrix.
    """
    params = in_float32(block_params)
    folded, scales = params, {}
    for line, stats in line_statistics(config, kind, params, hidden, tokens, frozenset({"peak"})).items():
        if not specs.keys() & set(line.readers) or (options.lines == "norms" and not line.producer.endswith("norm")):
            continue
        where = f"{name}/{line.readers[0]}"
        if not np.isfinite(to_host(stats.peak)).all():
            raise UserError(f"{where}: its calibration inputs are NaN or infinite; the model is damaged")
        if line.experts is not None:
            shortage = Shortage.of(stats, line.channels, moment=False)
            shortage.tell(where, "their channel scales are found with the tokens of all", note)
            stats = fill_in(stats, shortage)
        peak = line.gather(to_host(stats.peak)).max(axis=-2)
        scales[line] = smoothing_scale(peak, _weight_peak(line, params), options.strength).astype(np.float32)
        folded = fold(folded, line, scales[line])
    return folded, scales


def _weight_peak(line: Line, params: Params) -> np.ndarray:
    """Largest |w| of every channel over all output channels of the readers, of shape `line.shape`."""
    peaks = []
    for path in line.readers:
        rows = to_host(jnp.abs(leaf_at(params, path)["kernel"]).max(axis=-1))
        peaks.append(rows if line.experts is not None else rows.reshape(-1, rows.shape[-1]).max(axis=0))
    return line.gather(np.max(peaks, axis=0)).max(axis=-2)
