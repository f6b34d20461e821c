"""Name tables and config translation: complete, invertible, and strict about what the decoder cannot do."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from lq.errors import UserError
from lq.models.decoder import abstract_params
from lq.models.families import tensors_of, to_hf
from lq.models.loading import open_checkpoint, read_config
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec

CASES = [
    *["gemma2", "gemma3_text", "gpt2", "llama", "llama_linear", "mistral", "mixtral", "opt"],
    *["phi3", "phi3_short", "qwen2", "qwen3", "qwen3_moe"],
]


def config_of(tmp_path, **raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return read_config(tmp_path)


def sizes(model_type: str) -> dict:
    """config.json of a small model."""
    if model_type == "gpt2":
        return {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    common = {
        "model_type": model_type,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    if model_type == "opt":
        return common | {"ffn_dim": 40, "word_embed_proj_dim": 32}
    return common | {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096}


# Names


@pytest.mark.parametrize("case", CASES)
def test_every_leaf_is_filled_exactly_once(recorded, case):
    config = open_checkpoint(recorded / case).config
    filled = {}
    for tensor in tensors_of(config):
        for path in tensor.leaves:
            filled.setdefault(path, []).append(tensor.expert)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    assert filled.keys() == shapes.keys()
    for path, experts in filled.items():
        assert experts == ([None] if experts[0] is None else list(range(shapes[path][0])))


@pytest.mark.parametrize("case", CASES)
def test_export_gives_back_the_checkpoint(recorded, case):
    checkpoint = open_checkpoint(recorded / case)
    stored = load_file(recorded / case / "model.safetensors")
    written = dict(to_hf(checkpoint.config, checkpoint.params()))
    assert written.keys() == stored.keys()
    for name, array in written.items():
        assert array.dtype == stored[name].dtype
        np.testing.assert_array_equal(array, stored[name])


def test_packed_leaves_are_not_exported(recorded):
    checkpoint = open_checkpoint(recorded / "llama")
    params = checkpoint.params()
    spec = QuantSpec(bits=4, group_size=None, symmetric=True)
    params["head"]["kernel"] = QTensor.from_codes(jnp.zeros((32, 97), jnp.uint32), jnp.ones((1, 97)), None, spec)
    with pytest.raises(ValueError, match="head/kernel is packed"):
        to_hf(checkpoint.config, params)


RENAMED = {
    "gpt2 without prefix": ("gpt2", lambda name: name.removeprefix("transformer.")),
    "llama without prefix": ("llama", lambda name: name.removeprefix("model.")),
    "opt without model": ("opt", lambda name: name.removeprefix("model.")),
    "opt without model and decoder": ("opt", lambda name: name.removeprefix("model.decoder.")),
    "gemma3 beside vision": ("gemma3_text", lambda name: f"language_model.{name}"),
    "gemma3 inside model": ("gemma3_text", lambda name: name.replace("model.", "model.language_model.", 1)),
}


@pytest.mark.parametrize("which", RENAMED)
def test_prefix_may_be_there_or_not(recorded, copy_of, edit_weights, which):
    case, rename = RENAMED[which]
    directory = copy_of(case)
    edit_weights(directory, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    ours, expected = (dict(to_hf(c.config, c.params())) for c in map(open_checkpoint, (directory, recorded / case)))
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array)


WITHOUT_WEIGHT = {
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
    "gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias", "lm_head.weight"],
    "qwen2": ["lm_head.weight"],
    "gemma3_text": ["vision_tower.vision_model.head.weight", "multi_modal_projector.mm_soft_emb_norm.weight"],
}


@pytest.mark.parametrize("case", WITHOUT_WEIGHT)
def test_tensors_that_carry_no_weight_are_ignored(copy_of, edit_weights, case):
    directory = copy_of(case)
    more = {name: np.ones(3, np.float32) for name in WITHOUT_WEIGHT[case]}
    edit_weights(directory, lambda tensors: tensors | more)
    open_checkpoint(directory).params()


def test_vision_model_is_read_as_its_text_model(tmp_path):
    text = sizes("gemma3_text") | {"sliding_window": 64}
    inside = config_of(
        tmp_path, model_type="gemma3", text_config=text, vision_config={"model_type": "siglip_vision_model"}
    )
    assert inside == config_of(tmp_path, **text)


# Configs


def test_rope_of_older_config_files(tmp_path):
    old = sizes("llama") | {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    }
    rope = config_of(tmp_path, **old).kinds[0].rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("llama3", 500_000.0, 8.0, 1024)
    linear = config_of(tmp_path, **sizes("llama"), rope_scaling={"type": "linear", "factor": 2.0}).kinds[0].rope
    assert (linear.kind, linear.theta, linear.factor) == ("linear", 10_000.0, 2.0)


def test_gemma3_has_a_local_and_a_global_rope(tmp_path):
    raw = sizes("gemma3_text") | {
        "num_hidden_layers": 6,
        "sliding_window": 64,
        "sliding_window_pattern": 3,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    kinds = config_of(tmp_path, **raw).kinds
    assert [kind.window for kind in kinds] == [64, 64, None, 64, 64, None]
    assert (kinds[0].rope.kind, kinds[0].rope.theta) == ("default", 10_000.0)
    assert (kinds[2].rope.kind, kinds[2].rope.theta, kinds[2].rope.factor) == ("linear", 1_000_000.0, 8.0)


def test_windows_of_qwen2_start_at_max_window_layers(tmp_path):
    raw = sizes("qwen2") | {"sliding_window": 64, "max_window_layers": 2}
    assert [kind.window for kind in config_of(tmp_path, **raw, use_sliding_window=True).kinds] == [None, None, 64]
    assert [kind.window for kind in config_of(tmp_path, **raw, use_sliding_window=False).kinds] == [None] * 3


def test_routed_blocks_of_qwen3_moe(tmp_path):
    raw = sizes("qwen3_moe") | {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [2]}
    assert [kind.routed for kind in config_of(tmp_path, **raw).kinds] == [True, True, False]
    raw |= {"decoder_sparse_step": 2, "mlp_only_layers": []}
    assert [kind.routed for kind in config_of(tmp_path, **raw).kinds] == [False, True, False]


def test_longrope_attention_factor_follows_from_the_extension(tmp_path):
    raw = sizes("phi3") | {
        "original_max_position_embeddings": 256,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    }
    rope = config_of(tmp_path, **raw).kinds[0].rope
    assert rope.attention_factor == pytest.approx((1 + np.log(16) / np.log(256)) ** 0.5)
    assert rope.original_max_positions == 256


def test_blocks_of_equal_kind_are_equal(recorded):
    for case in CASES:
        config = open_checkpoint(recorded / case).config
        assert hash(config) == hash(dataclasses.replace(config))
        assert len(set(config.kinds)) <= 2


REFUSED = {
    "yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
    "dynamic": ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type"),
    "longrope": (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0]}},
        "long_factor",
    ),
    "odd rotary width": ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
    "chunked attention": ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    "activation": ("llama", {"hidden_act": "gelu_fast"}, "hidden_act"),
    "activation of opt": ("opt", {"activation_function": "tanh"}, "activation_function"),
    "norms after": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    "projected embeddings": ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
    "no final norm": ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    "norms without scale": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    "scores scaled by depth": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "soft cap of gemma 3": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "bias of phi 3": ("phi3", {"attention_bias": True}, "attention_bias"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_decoder_cannot_do_is_refused_by_its_key(tmp_path, what):
    model_type, changes, key = REFUSED[what]
    config_of(tmp_path, **sizes(model_type))
    with pytest.raises(UserError, match=key) as caught:
        config_of(tmp_path, **(sizes(model_type) | changes))
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)
