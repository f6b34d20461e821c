"""Small models made on the spot, in memory or in the layout of the Hugging Face hub."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lq.assets import ASSETS
from lq.models.config import BlockKind, ModelConfig, Rope
from lq.models.decoder import abstract_params
from lq.models.families import to_hf

VOCAB = 4096  # of the shipped tokenizer


def llama_config(blocks: int = 3, hidden: int = 64, *, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden // 4,
        max_positions=128,
        kinds=(BlockKind(rope=Rope(theta=10_000.0, rotary_dim=hidden // 4)),) * blocks,
        query_scale=(hidden // 4) ** -0.5,
        norm_eps=1e-5,
        tie_embeddings=tied,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


def random_params(config: ModelConfig, seed: int = 0, dtype=jnp.bfloat16):
    """Random parameters with weights large enough that blocks do something, norms around 1."""
    shapes = abstract_params(config)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        values = 1 + 0.1 * noise if "scale" in jax.tree_util.keystr(path) else noise / np.sqrt(leaf.shape[0])
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def write_directory(path: Path, config: ModelConfig, params) -> Path:
    """A llama directory with the shipped tokenizer."""
    from transformers import LlamaConfig

    path.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_blocks,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "standin" / name, path / name)
    safetensors.numpy.save_file(dict(to_hf(config, params)), path / "model.safetensors", metadata={"format": "pt"})
    return path
