"""Biases of zero for every matrix of the blocks, which bias correction then fills."""

import dataclasses

import numpy as np

from lq.models.config import ModelConfig
from lq.transforms.rewrite import Read, Rewrite, matrix_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddBiasesOptions:
    """None."""


def add_biases(config: ModelConfig, options: AddBiasesOptions) -> Rewrite:
    """A bias of zero beside every matrix that has none, experts excepted: room for bias correction."""
    del options
    return AddBiases(config)


class AddBiases(Rewrite):
    """See `add_biases`."""

    def __init__(self, config: ModelConfig):
        super().__init__(dataclasses.replace(config, qkv_bias=True, attention_out_bias=True, mlp_bias=True))
        self._old = config

    def leaf(self, part: str, path: str, read: Read) -> np.ndarray | None:
        matrix, leaf = matrix_of(part, path)
        if leaf != "bias" or matrix.endswith("norm") or not part.startswith("block_"):
            return None
        old = self._old
        switches = {"attention/o_proj": old.attention_out_bias, "attention": old.qkv_bias, "mlp": old.mlp_bias}
        if switches.get(matrix, switches.get(matrix.split("/")[0])):
            return None
        return np.zeros(read(f"{matrix}/kernel").shape[-1])
