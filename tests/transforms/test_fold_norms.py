"""Folding: what becomes of norms, biases and means, leaf by leaf. That nothing else changes is in test_preserved.py."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from random_models import TOKENS, config_of, random_model

from lq.errors import UserError
from lq.models.config import BlockKind, Experts
from lq.models.context import context_for
from lq.models.decoder import abstract_params, apply_block, embed
from lq.models.matrices import parameter_count
from lq.models.source import InMemory
from lq.transforms import TransformedSource, transform

pytestmark = pytest.mark.once

LAYERNORM = ["opt, tied", "opt, untied", "gpt2, tied", "opt without biases"]


def folded(name: str, **options):
    """Original and folded parameters by path, and the config."""
    config, params = random_model(name)
    with jax.enable_x64(True):
        new_config, new = transform(config, params, "fold_norms", options)
    return flatten_dict(params, sep="/"), flatten_dict(new, sep="/"), new_config


@pytest.mark.parametrize("name", ["llama, untied", "gemma2, untied", "qwen3_moe, tied", "opt, tied"])
def test_gains_of_norms_in_front_become_one_and_others_stay(name):
    old, new, config = folded(name)
    for path, scale in old.items():
        if not path.endswith("scale"):
            continue
        one = path.endswith(("attention_norm/scale", "mlp_norm/scale"))
        one |= path == "head/final_norm/scale" and not config.tie_embeddings and config.norm == "rmsnorm"
        expected = np.full_like(scale, 1.0 - config.norm_offset) if one else scale
        np.testing.assert_array_equal(new[path], expected, err_msg=path)
    assert any("post_norm" in path or "q_norm" in path for path in new) == (not name.startswith(("llama", "opt")))


def test_the_router_and_every_expert_take_the_gain():
    old, new, _ = folded("qwen3_moe, untied")
    gain = old["block_0/mlp_norm/scale"]
    for matrix, sum_over in (("router", "kn,k->kn"), ("gate_proj", "ekn,k->ekn"), ("up_proj", "ekn,k->ekn")):
        kernel = old[f"block_0/moe/{matrix}/kernel"]
        np.testing.assert_allclose(new[f"block_0/moe/{matrix}/kernel"], np.einsum(sum_over, kernel, gain), rtol=1e-15)
    np.testing.assert_array_equal(new["block_0/moe/down_proj/kernel"], old["block_0/moe/down_proj/kernel"])


def test_biases_of_layernorms_go_through_the_matrices():
    old, new, config = folded("gpt2, tied")
    c, W, b = (old[f"block_1/{p}"] for p in ("mlp_norm/bias", "mlp/up_proj/kernel", "mlp/up_proj/bias"))
    np.testing.assert_allclose(new["block_1/mlp/up_proj/bias"], c @ W + b, rtol=1e-12)
    np.testing.assert_array_equal(new["block_1/mlp_norm/bias"], np.zeros(config.hidden_size))


def test_matrices_without_biases_get_them():
    """One switch of the config is for up_proj and down_proj: the latter's bias is zero."""
    old, new, config = folded("opt without biases")
    assert (config.qkv_bias, config.mlp_bias, config.attention_out_bias) == (True, True, False)
    added = {path.partition("/")[2] for path in new.keys() - old.keys()}
    assert added == {f"{m}/bias" for m in ("attention/q_proj", "attention/k_proj", "attention/v_proj")} | {
        "mlp/up_proj/bias",
        "mlp/down_proj/bias",
    }
    np.testing.assert_array_equal(new["block_0/mlp/down_proj/bias"], np.zeros(config.hidden_size))


@pytest.mark.parametrize("name", LAYERNORM)
def test_without_layernorms_nothing_adds_a_mean_to_the_stream(name):
    """Of the stream itself, behind every block: 1e-14 of its largest entry, sums of rounded terms."""
    config, params = random_model(name)
    with jax.enable_x64(True):
        config, params = transform(config, params, "fold_norms", {"rmsnorm": True})
        h = embed(config, params, TOKENS, context_for(TOKENS))
        for i, kind in enumerate(config.kinds):
            assert np.abs(h.mean(-1)).max() <= 1e-14 * np.abs(h).max()
            h = apply_block(config, kind, params[f"block_{i}"], h, context_for(TOKENS))
        assert np.abs(h.mean(-1)).max() <= 1e-14 * np.abs(h).max()


@pytest.mark.parametrize("name", LAYERNORM)
def test_tables_final_norm_and_head_of_layernorm_models_stay(name):
    old, new, config = folded(name, rmsnorm=True)
    assert (config.norm, config.final_norm, config.center_embeddings) == ("rmsnorm", "layernorm", True)
    kept = [path for path in old if path.startswith(("embed", "head"))]
    assert len(kept) >= 4
    for path in kept:
        np.testing.assert_array_equal(new[path], old[path])


@pytest.mark.parametrize("name", ["llama, untied", "gemma3_text, tied"])
def test_rmsnorms_are_what_they_are_already(name):
    (_, plain, config), (_, asked, same) = folded(name), folded(name, rmsnorm=True)
    assert config == same == config_of(name)
    for path in plain:
        np.testing.assert_array_equal(plain[path], asked[path])


def test_twice_is_once():
    """The second time all gains are one; a product with one is exact."""
    with jax.enable_x64(True):
        config, once = transform(*random_model("opt without biases"), "fold_norms", {"rmsnorm": True})
        twice_config, twice = transform(config, once, "fold_norms", {"rmsnorm": True})
    assert twice_config == config
    jax.tree.map(np.testing.assert_array_equal, twice, once)


@pytest.mark.parametrize("name", [*LAYERNORM, "llama, tied", "gemma2, untied"])
@pytest.mark.parametrize("rmsnorm", [False, True])
def test_the_leaves_are_those_the_new_config_asks_for(name, rmsnorm):
    _, new, config = folded(name, rmsnorm=rmsnorm)
    expected = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    assert {path: leaf.shape for path, leaf in new.items()} == expected
    assert sum(leaf.size for leaf in new.values()) == parameter_count(config)


def test_experts_behind_a_layernorm_are_refused():
    experts = Experts(count=2, per_token=1, intermediate_size=8)
    config = dataclasses.replace(config_of("gpt2"), kinds=(BlockKind(routed=True),), experts=experts)
    with pytest.raises(UserError, match=r"^gpt2: experts have no biases that those of a LayerNorm could be folded"):
        TransformedSource(InMemory(config, {}), "fold_norms")
