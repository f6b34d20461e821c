"""Gains of norms folded into the matrices that read them, and LayerNorm turned into RMSNorm.

A norm with gain g (and, of LayerNorm, bias c) in front of y = x W + b:

    (norm(h) g + c) W + b = norm(h) (diag(g) W) + (c W + b)

LayerNorm is an RMSNorm of h less its mean over the channels. Once nothing adds a mean to the residual stream, the two
are equal (SliceGPT, arXiv 2401.15024, section 3.2): every matrix and bias that writes to the stream loses its mean over
the output channels, and the embedding's output loses its mean as the model runs, which the first LayerNorm would have
taken away unseen. (Taken off the table instead, it would be missing from a tied head.)

Left as they are:
- the final norm of tied embeddings, whose kernel is the embedding, and of LayerNorm, since a head has no bias. It stays
  a LayerNorm then: of a stream without a mean it is what it was;
- Gemma's norms behind attention and feed-forward, and norms of query and key heads: no matrix follows them.
"""

import dataclasses
from typing import Any

import numpy as np

from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.transforms.rewrite import NORMS, READS, WRITES, Read, Rewrite, matrix_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldNormsOptions:
    """See the module's docstring."""

    rmsnorm: bool = False  # turn LayerNorm into RMSNorm too; RMSNorm is one already


def fold_norms(config: ModelConfig, options: FoldNormsOptions) -> Rewrite:
    """Gains of norms into the matrices behind them, and on request LayerNorm into RMSNorm.

    Matrices behind a LayerNorm that had no biases get them, and `down_proj` with them, since one switch of the config
    is for both.

    Raises:
      UserError: experts behind a LayerNorm, which have no biases.
    """
    return FoldNorms(config, options)


class FoldNorms(Rewrite):
    """See `fold_norms`."""

    def __init__(self, config: ModelConfig, options: FoldNormsOptions):
        layernorm = config.norm == "layernorm"
        if layernorm and any(kind.routed for kind in config.kinds):
            raise UserError(f"{config.family}: experts have no biases that those of a LayerNorm could be folded into")
        changes: dict[str, Any] = {"qkv_bias": True, "mlp_bias": True} if layernorm else {}
        if layernorm and options.rmsnorm:
            changes |= {"norm": "rmsnorm", "final_norm": "layernorm", "center_embeddings": True}
        super().__init__(dataclasses.replace(config, **changes))
        self._old = config
        self._without_mean = layernorm and options.rmsnorm
        self._folds_last = final_norm_folds(config)

    def leaf(self, part: str, path: str, read: Read) -> np.ndarray | None:
        matrix, leaf = matrix_of(part, path)
        norm = READS.get(matrix, matrix)
        if norm == "final_norm" and not self._folds_last:
            return None
        if matrix in READS:
            return self._reader(matrix, path, norm, read)
        if matrix in NORMS:
            return np.full(self._old.hidden_size, 1.0 - self._old.norm_offset if leaf == "scale" else 0.0)
        if matrix in WRITES:
            return self._writer(matrix, leaf, read)
        return None

    def _reader(self, matrix: str, path: str, norm: str, read: Read) -> np.ndarray | None:
        if path.endswith("kernel"):
            return (read(f"{norm}/scale") + self._old.norm_offset)[:, None] * read(path)
        if self._old.norm != "layernorm":
            return None
        through = read(f"{norm}/bias") @ read(f"{matrix}/kernel")
        return through + read(f"{matrix}/bias") if self._had_bias(matrix) else through

    def _writer(self, matrix: str, leaf: str, read: Read) -> np.ndarray | None:
        if leaf == "bias" and not self._had_bias(matrix):
            return np.zeros(self._old.hidden_size)
        if not self._without_mean:
            return None
        value = read(f"{matrix}/{leaf}")
        return value - value.mean(-1, keepdims=True)

    def _had_bias(self, matrix: str) -> bool:
        config = self._old
        if matrix == "attention/o_proj":
            return config.attention_out_bias
        return config.qkv_bias if matrix.startswith("attention/") else config.mlp_bias


def final_norm_folds(config: ModelConfig) -> bool:
    """Whether the head can take the final norm's gain: it is a matrix of its own, and there is no bias to take too."""
    return not config.tie_embeddings and (config.final_norm or config.norm) == "rmsnorm"
