"""The numbers in a config.json, checked by the key that holds them, before anything is computed from them.

What a value means is said in `families.py`; here a size must be a size. A key that is not listed is not looked at.
"""

import math
from collections.abc import Mapping
from typing import Any

from lq.errors import UserError

COUNTS = {
    *("decoder_sparse_step", "ffn_dim", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("moe_intermediate_size", "n_embd", "n_head", "n_layer", "n_positions", "num_attention_heads"),
    *("num_experts_per_tok", "num_hidden_layers", "num_local_experts", "original_max_position_embeddings"),
    *("vocab_size", "word_embed_proj_dim"),
}
COUNTS_OR_NULL = {"head_dim", "n_inner", "num_key_value_heads", "sliding_window"}
POSITIVE = {
    *("factor", "high_freq_factor", "layer_norm_epsilon", "low_freq_factor", "partial_rotary_factor"),
    *("query_pre_attn_scalar", "rms_norm_eps", "rope_local_base_freq", "rope_theta"),
}
POSITIVE_OR_NULL = {"attention_factor", "attn_logit_softcapping", "final_logit_softcapping"}
NESTED = {"text_config", "rope_parameters", "rope_scaling", "full_attention", "sliding_attention"}


def check_values(raw: Mapping[str, Any], inside: str = "") -> None:
    """Raises UserError, beginning with the key, for the first value that cannot be; `inside` is put before the key."""
    for key, value in raw.items():
        name = f"{inside}{key}"
        or_null = " or null" if key in COUNTS_OR_NULL | POSITIVE_OR_NULL else ""
        if value is None and or_null:
            continue
        if key in COUNTS | COUNTS_OR_NULL and not (_is_number(value, int) and value >= 1):
            raise UserError(f"{name}: {value!r}; write a whole number from 1{or_null}")
        if key in POSITIVE | POSITIVE_OR_NULL and not (_is_number(value, int | float) and 0 < value < math.inf):
            raise UserError(f"{name}: {value!r}; write a number above 0{or_null}")
        if key in NESTED and isinstance(value, Mapping):
            check_values(value, f"{name}.")


def _is_number(value, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
