"""Small models of every family in which nothing is hidden by a zero, a one or a mean of zero; float64."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lq.models.config import ModelConfig
from lq.models.decoder import Decoder, abstract_params
from lq.models.loading import open_checkpoint

RECORDED = Path(__file__).parent / "fixtures" / "models"
FAMILIES = [
    *["gemma2", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe"],
]
NO_BIASES = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}
VARIANTS = {  # name -> family, changes
    "opt without biases": ("opt", NO_BIASES),
    "opt without biases, untied": ("opt", NO_BIASES | {"tie_embeddings": False}),
    "llama of 14 channels": ("llama", {"hidden_size": 14}),  # 7 x 2: a random factor
    "llama of 28 channels, tied": ("llama", {"hidden_size": 28, "tie_embeddings": True}),  # Paley's
    "mistral of 6 heads": ("mistral", {"num_heads": 6, "num_kv_heads": 3, "intermediate_size": 44}),
}
MODELS = [*(f"{family}, {tied}" for family in FAMILIES for tied in ("tied", "untied")), *VARIANTS]
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 20)).astype(np.int32)
VALID = np.ones(TOKENS.shape, bool)
VALID[1, :6] = False


def config_of(name: str) -> ModelConfig:
    """By family as recorded, "opt", with or without tied embeddings, "opt, untied", or a variant."""
    family, _, tied = name.partition(", ")
    changes = {"tie_embeddings": tied == "tied"} if tied else {}
    if name in VARIANTS:
        family, changes = VARIANTS[name]
    return dataclasses.replace(open_checkpoint(RECORDED / family).config, **changes)


@functools.cache
def random_model(name: str) -> tuple[ModelConfig, dict]:
    """Config and parameters, NumPy float64: gains from a fifth to five, weights, biases and embeddings with a mean."""
    config, rng = config_of(name), np.random.default_rng(7)

    def fill(path, leaf):
        keys = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.standard_normal(leaf.shape)
        if keys.endswith("scale"):
            return np.exp(np.clip(0.7 * noise, -1.6, 1.6)) - config.norm_offset
        if keys.endswith("bias"):
            return 0.2 + 0.5 * noise
        if keys.endswith("embedding"):
            return 0.3 + noise
        return (0.3 + noise) / np.sqrt(leaf.shape[-2])

    return config, jax.tree_util.tree_map_with_path(fill, abstract_params(config))


def logits(config: ModelConfig, params, dtype=np.float64) -> np.ndarray:
    """Logits of the real tokens, of a computation in `dtype`."""
    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), params)
        out = Decoder(config).apply({"params": params}, TOKENS, VALID)
        assert out.dtype == jnp.promote_types(dtype, jnp.float32)
        return np.asarray(out)[VALID]


@functools.cache
def original_logits(name: str) -> np.ndarray:
    return logits(*random_model(name))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |a|"""
    return float(np.abs(a - b).max() / np.abs(a).max())
