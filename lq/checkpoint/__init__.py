"""Quantized models on disk: one safetensors shard per part, a manifest, the original's config and tokenizer."""

from lq.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from lq.checkpoint.write import check_output, write_quantized
from lq.models.loading import is_quantized

__all__ = ["QuantizedCheckpoint", "check_output", "is_quantized", "open_quantized", "write_quantized"]
