"""The supported model families, side by side: how the config and the tensor names of each translate.

A `Family` is two things: a function from a Hugging Face config object to our `ModelConfig`, and a name table
(`names.py`). Adding one is writing these two and a line in `FAMILIES`. What the decoder cannot do is refused here, by
the config key that asks for it, so that a model either runs as its authors meant it or does not run.

Sources: the modeling files of transformers 5; every family is compared with them in `tests/models/test_parity.py`.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lq.errors import UserError
from lq.models.config import Activation, BlockKind, Experts, ModelConfig, Rope
from lq.models.decoder import abstract_params
from lq.models.names import (
    Rule,
    StoredTensor,
    conv1d,
    embedding,
    in_blocks,
    linear,
    norm,
    stored_tensors,
    tensors_from,
)
from lq.numerics.segmented import is_packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What lq knows about one model family."""

    read_config: Callable[[Any], ModelConfig]  # takes a transformers config; raises UserError naming the offending key
    names: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("model.",)  # a stored name may carry or lack these, tried in this order
    ignored: tuple[str, ...] = ("*rotary_emb.inv_freq",)  # patterns of names that carry no weight of ours, unprefixed

    def bare(self, name: str) -> str:
        """`name` without the optional prefixes; two spellings of one tensor become equal."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor that no rule asks for may be there. A head beside tied embeddings is their copy."""
        bare = self.bare(name)
        return bare == "lm_head.weight" or any(fnmatch.fnmatchcase(bare, pattern) for pattern in self.ignored)


def tensors_of(config: ModelConfig) -> tuple[StoredTensor, ...]:
    """Every tensor a checkpoint of this model holds: name, stored shape, and the leaves it fills."""
    leaves: dict[str, Any] = flatten_dict(abstract_params(config), sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    return stored_tensors(FAMILIES[config.family].names, shapes, config.num_blocks)


def to_hf(config: ModelConfig, params) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor of the checkpoint in Hugging Face layout; the inverse of loading.

    Args:
      config: the model's description; `config.family` picks the name table.
      params: its parameters, all dense, on the host or a device.

    Raises:
      ValueError: a leaf is packed, which this layout has no room for.
    """
    leaves: Any = flatten_dict(params, sep="/")
    for path, leaf in leaves.items():
        if is_packed(leaf):
            raise ValueError(f"{path} is packed; dequantize it first")
    return tensors_from(tensors_of(config), leaves)


# Configs. In these functions `c` is a transformers config object of the family.

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _only(c, key: str, *allowed) -> None:
    value = getattr(c, key, allowed[0])
    if value not in allowed:
        raise UserError(f"{key}: {value!r} is not supported; lq runs such models with {allowed[0]!r} only")


def _activation(c, key: str) -> Activation:
    name = getattr(c, key)
    if name not in ACTIVATIONS:
        raise UserError(f"{key}: {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def eos_token_ids(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as released: one id, a list, or null. Raises UserError for anything else."""
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise UserError(f"eos_token_id: {value!r}; write a token id, a list of them, or null")
    return tuple(ids)


def _head_dim(c) -> int:
    if given := getattr(c, "head_dim", None):
        return given
    if c.hidden_size % c.num_attention_heads:
        heads, size = (c.attribute_map.get(key, key) for key in ("num_attention_heads", "hidden_size"))
        raise UserError(
            f"{heads}: {c.num_attention_heads} does not divide {size} {c.hidden_size}; correct one of the two"
        )
    return c.hidden_size // c.num_attention_heads


def _kv_heads(c) -> int:
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    if c.num_attention_heads % heads:
        raise UserError(f"num_key_value_heads: {heads} does not divide num_attention_heads {c.num_attention_heads}")
    return heads


def _experts(c, *, count: int, **fields) -> Experts:
    if c.num_experts_per_tok > count > 0:
        raise UserError(f"num_experts_per_tok: {c.num_experts_per_tok} of {count} experts; write {count} or less")
    return Experts(count=count, per_token=c.num_experts_per_tok, **fields)


def _rope(c, layer_type: str) -> Rope:
    """The rotary table of one layer type. `rope_parameters` is a dict, or a dict per layer type (Gemma 3)."""
    given = c.rope_parameters.get(layer_type, c.rope_parameters)
    rotary_dim = int(_head_dim(c) * (given.get("partial_rotary_factor") or 1.0))
    if rotary_dim % 2:
        raise UserError(f"partial_rotary_factor: rotates {rotary_dim} channels of a head; it must be an even number")
    kind = given["rope_type"]
    scaling: dict[str, Any] = {}
    if kind == "linear":
        scaling = {"factor": float(given["factor"])}
    elif kind == "llama3":
        scaling = {key: float(given[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_max_positions"] = given["original_max_position_embeddings"]
    elif kind == "longrope":
        original = given["original_max_position_embeddings"]
        factor = given.get("factor") or c.max_position_embeddings / original
        attention_factor = given.get("attention_factor")
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        scaling = {"original_max_positions": original, "attention_factor": attention_factor}
        for key in ("short_factor", "long_factor"):
            if len(given[key]) != rotary_dim // 2:
                raise UserError(
                    f"{key}: {len(given[key])} numbers; {rotary_dim} rotated channels need {rotary_dim // 2}"
                )
            scaling[key] = tuple(map(float, given[key]))
    elif kind != "default":
        raise UserError(
            f"rope_parameters.rope_type (rope_scaling.type in older files): {kind!r} is not supported; "
            "known: default, linear, llama3, longrope"
        )
    return Rope(theta=float(given["rope_theta"]), rotary_dim=rotary_dim, kind=kind, **scaling)


def _rotary_blocks(c, layer_types: Sequence[str], routed: Callable[[int], bool]) -> tuple[BlockKind, ...]:
    ropes = {layer_type: _rope(c, layer_type) for layer_type in set(layer_types)}
    kinds = []
    for i, layer_type in enumerate(layer_types):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UserError(f"layer_types: {layer_type!r} is not supported; known: full_attention, sliding_attention")
        window = c.sliding_window if layer_type == "sliding_attention" else None
        kinds.append(BlockKind(window=window, rope=ropes[layer_type], routed=routed(i)))
    return tuple(kinds)


def _same_everywhere(c) -> list[str]:
    """The layer types of families that slide in every block or in none."""
    return ["full_attention" if c.sliding_window is None else "sliding_attention"] * c.num_hidden_layers


def _sizes(c) -> dict[str, Any]:
    """The fields that every family spells alike."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": _kv_heads(c),
        "head_dim": _head_dim(c),
        "max_positions": c.max_position_embeddings,
        "query_scale": _head_dim(c) ** -0.5,
        "tie_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_ids": eos_token_ids(c.eos_token_id),
        "pad_token_id": c.pad_token_id,
    }


def _llama_like(
    c,
    family: str,
    layer_types: Sequence[str],
    *,
    routed: Callable[[int], bool] = lambda i: False,
    activation_key: str = "hidden_act",
    **fields,
) -> ModelConfig:
    """Rotary positions, RMSNorm, gated feed-forward; `fields` says what the family does otherwise."""
    common: dict[str, Any] = {
        "kinds": _rotary_blocks(c, layer_types, routed),
        "intermediate_size": c.intermediate_size,
        "activation": _activation(c, activation_key),
        "norm_eps": c.rms_norm_eps,
    }
    return ModelConfig(family=family, **(_sizes(c) | common | fields))


def _attention_biases(c) -> dict[str, Any]:
    return {"qkv_bias": c.attention_bias, "attention_out_bias": c.attention_bias}


def _llama(c) -> ModelConfig:
    layer_types = ["full_attention"] * c.num_hidden_layers
    return _llama_like(c, "llama", layer_types, mlp_bias=c.mlp_bias, **_attention_biases(c))


def _mistral(c) -> ModelConfig:
    return _llama_like(c, "mistral", _same_everywhere(c))


def _qwen2(c) -> ModelConfig:
    return _llama_like(c, "qwen2", c.layer_types, qkv_bias=True)


def _qwen3(c) -> ModelConfig:
    return _llama_like(c, "qwen3", c.layer_types, qk_norm=True, **_attention_biases(c))


def _phi3(c) -> ModelConfig:
    _only(c, "attention_bias", False)
    return _llama_like(c, "phi3", _same_everywhere(c))


def _gemma(c, family: str, **fields) -> ModelConfig:
    _only(c, "use_bidirectional_attention", False, None)
    return _llama_like(
        c,
        family,
        c.layer_types,
        activation_key="hidden_activation",
        norm_offset=1.0,
        post_norms=True,
        query_scale=c.query_pre_attn_scalar**-0.5,
        logit_softcap=c.final_logit_softcapping,
        embedding_scale=c.hidden_size**0.5,
        **_attention_biases(c),
        **fields,
    )


def _gemma2(c) -> ModelConfig:
    return _gemma(c, "gemma2", attention_softcap=c.attn_logit_softcapping)


def _gemma3(c) -> ModelConfig:
    c = getattr(c, "text_config", c)  # the 4B model and larger ones come with a vision tower, which is left out
    _only(c, "attn_logit_softcapping", None)  # Gemma 2's; transformers ignores it here
    return _gemma(c, "gemma3_text", qk_norm=True)


def _mixtral(c) -> ModelConfig:
    experts = _experts(c, count=c.num_local_experts, intermediate_size=c.intermediate_size)
    return _llama_like(c, "mixtral", _same_everywhere(c), routed=lambda i: True, experts=experts)


def _qwen3_moe(c) -> ModelConfig:
    experts = _experts(c, count=c.num_experts, intermediate_size=c.moe_intermediate_size, renormalize=c.norm_topk_prob)

    def routed(i: int) -> bool:
        return c.num_experts > 0 and i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0

    return _llama_like(
        c, "qwen3_moe", _same_everywhere(c), routed=routed, experts=experts, qk_norm=True, **_attention_biases(c)
    )


def _layernorm_decoder(c, family: str, *, biases: bool, **fields) -> ModelConfig:
    """Learned positions, LayerNorm, plain feed-forward: the decoders before Llama."""
    return ModelConfig(
        family=family,
        kinds=(BlockKind(),) * c.num_hidden_layers,
        gated_mlp=False,
        norm="layernorm",
        activation=_activation(c, "activation_function"),
        qkv_bias=biases,
        attention_out_bias=biases,
        mlp_bias=biases,
        **(_sizes(c) | fields),
    )


def _opt(c) -> ModelConfig:
    _only(c, "do_layer_norm_before", True)  # false in opt-350m alone
    _only(c, "word_embed_proj_dim", c.hidden_size)
    _only(c, "layer_norm_elementwise_affine", True)
    _only(c, "_remove_final_layer_norm", False)
    # Positions start at row 2 of their table; the norms' epsilon is torch's default.
    specific = {"learned_position_offset": 2, "norm_eps": 1e-5, "intermediate_size": c.ffn_dim}
    return _layernorm_decoder(c, "opt", biases=c.enable_bias, **specific)


def _gpt2(c) -> ModelConfig:
    _only(c, "scale_attn_by_inverse_layer_idx", False)
    _only(c, "add_cross_attention", False)
    specific = {
        "learned_position_offset": 0,
        "norm_eps": c.layer_norm_epsilon,
        "intermediate_size": c.n_inner or 4 * c.hidden_size,
    }
    if not c.scale_attn_weights:
        specific["query_scale"] = 1.0
    return _layernorm_decoder(c, "gpt2", biases=True, **specific)


# Names. Pieces that families share first, then one table each.

QKV = (
    *linear("self_attn.q_proj", "attention/q_proj"),
    *linear("self_attn.k_proj", "attention/k_proj"),
    *linear("self_attn.v_proj", "attention/v_proj"),
)
ATTENTION = (
    *QKV,
    *linear("self_attn.o_proj", "attention/o_proj"),
    *norm("self_attn.q_norm", "attention/q_norm"),
    *norm("self_attn.k_norm", "attention/k_norm"),
)
GATED_MLP = (
    *linear("mlp.gate_proj", "mlp/gate_proj"),
    *linear("mlp.up_proj", "mlp/up_proj"),
    *linear("mlp.down_proj", "mlp/down_proj"),
)
PRE_NORMS = (
    *norm("input_layernorm", "attention_norm"),
    *norm("post_attention_layernorm", "mlp_norm"),
)
HEAD = linear("lm_head", "head")


def _llama_names(*block: Rule) -> tuple[Rule, ...]:
    return (
        *embedding("model.embed_tokens", "embed/tokens"),
        *in_blocks("model.layers.{i}", block),
        *norm("model.norm", "head/final_norm"),
        *HEAD,
    )


LLAMA_NAMES = _llama_names(*PRE_NORMS, *ATTENTION, *GATED_MLP)

PHI3_NAMES = _llama_names(
    *PRE_NORMS,
    *linear("self_attn.qkv_proj", "attention/q_proj", "attention/k_proj", "attention/v_proj"),
    *linear("self_attn.o_proj", "attention/o_proj"),
    *linear("mlp.gate_up_proj", "mlp/gate_proj", "mlp/up_proj"),
    *linear("mlp.down_proj", "mlp/down_proj"),
)

GEMMA_NAMES = _llama_names(
    *norm("input_layernorm", "attention_norm"),
    *norm("post_attention_layernorm", "attention_post_norm"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *norm("post_feedforward_layernorm", "mlp_post_norm"),
    *ATTENTION,
    *GATED_MLP,
)

MIXTRAL_NAMES = _llama_names(
    *PRE_NORMS,
    *ATTENTION,
    *linear("block_sparse_moe.gate", "moe/router"),
    *linear("block_sparse_moe.experts.{e}.w1", "moe/gate_proj"),
    *linear("block_sparse_moe.experts.{e}.w2", "moe/down_proj"),
    *linear("block_sparse_moe.experts.{e}.w3", "moe/up_proj"),
)

QWEN3_MOE_NAMES = _llama_names(
    *PRE_NORMS,
    *ATTENTION,
    *GATED_MLP,  # blocks that are not routed
    *linear("mlp.gate", "moe/router"),
    *linear("mlp.experts.{e}.gate_proj", "moe/gate_proj"),
    *linear("mlp.experts.{e}.up_proj", "moe/up_proj"),
    *linear("mlp.experts.{e}.down_proj", "moe/down_proj"),
)

OPT_NAMES = (
    *embedding("model.decoder.embed_tokens", "embed/tokens"),
    *embedding("model.decoder.embed_positions", "embed/positions"),
    *in_blocks(
        "model.decoder.layers.{i}",
        (
            *norm("self_attn_layer_norm", "attention_norm"),
            *QKV,
            *linear("self_attn.out_proj", "attention/o_proj"),
            *norm("final_layer_norm", "mlp_norm"),
            *linear("fc1", "mlp/up_proj"),
            *linear("fc2", "mlp/down_proj"),
        ),
    ),
    *norm("model.decoder.final_layer_norm", "head/final_norm"),
    *HEAD,
)

GPT2_NAMES = (
    *embedding("transformer.wte", "embed/tokens"),
    *embedding("transformer.wpe", "embed/positions"),
    *in_blocks(
        "transformer.h.{i}",
        (
            *norm("ln_1", "attention_norm"),
            *conv1d("attn.c_attn", "attention/q_proj", "attention/k_proj", "attention/v_proj"),
            *conv1d("attn.c_proj", "attention/o_proj"),
            *norm("ln_2", "mlp_norm"),
            *conv1d("mlp.c_fc", "mlp/up_proj"),
            *conv1d("mlp.c_proj", "mlp/down_proj"),
        ),
    ),
    *norm("transformer.ln_f", "head/final_norm"),
    *HEAD,
)

GEMMA3 = Family(
    read_config=_gemma3,
    names=GEMMA_NAMES,
    prefixes=("language_model.", "model.", "language_model."),  # each order occurs around a vision tower
    ignored=("*rotary_emb.inv_freq", "vision_tower.*", "multi_modal_projector.*"),
)

FAMILIES: dict[str, Family] = {  # by `model_type`
    "gemma2": Family(read_config=_gemma2, names=GEMMA_NAMES),
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "gpt2": Family(
        read_config=_gpt2,
        names=GPT2_NAMES,
        prefixes=("transformer.",),
        ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),  # causal masks, kept as buffers once
    ),
    "llama": Family(read_config=_llama, names=LLAMA_NAMES),
    "mistral": Family(read_config=_mistral, names=LLAMA_NAMES),
    "mixtral": Family(read_config=_mixtral, names=MIXTRAL_NAMES),
    "opt": Family(read_config=_opt, names=OPT_NAMES, prefixes=("model.", "decoder.")),
    "phi3": Family(read_config=_phi3, names=PHI3_NAMES),
    "qwen2": Family(read_config=_qwen2, names=LLAMA_NAMES),
    "qwen3": Family(read_config=_qwen3, names=LLAMA_NAMES),
    "qwen3_moe": Family(read_config=_qwen3_moe, names=QWEN3_MOE_NAMES),
}
