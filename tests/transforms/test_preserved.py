"""Every transform of every family computes what the original does: in float64 to rounding, in float32 as torch did."""

import jax
import numpy as np
import pytest
from random_models import FAMILIES, MODELS, RECORDED, logits, original_logits, random_model, relative_difference
from safetensors.numpy import load_file

from lq.models.decoder import Decoder
from lq.models.generate import generate
from lq.models.loading import open_checkpoint
from lq.transforms import transform

# A logit is the end of some hundred rounded sums in each model, off by 2^-53 of their size; gains of up to five, in two
# blocks or three, enlarge what was off before them about tenfold: 100 * 1.1e-16 * 10. A wrong factor is above 1e-3.
EXACT = 1e-13
CASES = [*FAMILIES, "llama_linear", "phi3_short"]
ROUNDED = 1e-5  # of float32, as for the families themselves

EVERYWHERE = {"heads": True, "down": True}
WITHOUT_RESIDUAL = {"residual": False, **EVERYWHERE}


def transformed(name: str, method: str, options: dict):
    config, params = random_model(name)
    with jax.enable_x64(True):
        return transform(config, params, method, options)


def rotations(name: str) -> dict:
    """All there are of a family."""
    return WITHOUT_RESIDUAL if name.startswith("gemma") else EVERYWHERE


@pytest.mark.parametrize("name", MODELS)
def test_folding_norms_changes_nothing(name, record_property):
    config, params = transformed(name, "fold_norms", {})
    difference = relative_difference(original_logits(name), logits(config, params))
    record_property("relative_difference", difference)
    assert difference <= EXACT


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("opt", "gpt2"))])
def test_layernorm_as_rmsnorm_changes_nothing(name, record_property):
    config, params = transformed(name, "fold_norms", {"rmsnorm": True})
    assert config.norm == "rmsnorm"
    assert "bias" not in params["block_0"]["attention_norm"]
    difference = relative_difference(original_logits(name), logits(config, params))
    record_property("relative_difference", difference)
    assert difference <= EXACT


@pytest.mark.parametrize("name", MODELS)
def test_rotations_change_nothing(name, record_property):
    config, params = transformed(name, "hadamard", rotations(name))
    difference = relative_difference(original_logits(name), logits(config, params))
    record_property("relative_difference", difference)
    assert difference <= EXACT


@pytest.mark.parametrize("options", [{"values": False}, {"residual": False}, WITHOUT_RESIDUAL | {"values": False}])
@pytest.mark.parametrize("name", ["gpt2, tied", "mixtral, untied", "qwen3_moe, tied"])
def test_each_rotation_alone_changes_nothing(name, options):
    config, params = transformed(name, "hadamard", options)
    assert relative_difference(original_logits(name), logits(config, params)) <= EXACT


@pytest.mark.parametrize("order", [("fold_norms", "hadamard"), ("hadamard", "fold_norms"), ("hadamard", "hadamard")])
def test_one_transform_after_another_changes_nothing(order):
    config, params = random_model("llama, untied")
    with jax.enable_x64(True):
        for seed, method in enumerate(order):
            config, params = transform(config, params, method, {"seed": seed} if method == "hadamard" else {})
    assert relative_difference(original_logits("llama, untied"), logits(config, params)) <= EXACT


def recorded(case: str, method: str):
    """The recorded checkpoint, transformed in float32, and what torch said of the original."""
    checkpoint = open_checkpoint(RECORDED / case)
    options = {"rmsnorm": True} if method == "fold_norms" else rotations(case)
    config, params = transform(checkpoint.config, checkpoint.params(), method, options)
    return Decoder(config), params, load_file(RECORDED / case / "reference.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["fold_norms", "hadamard"])
def test_logits_are_still_torchs(case, method, record_property):
    model, params, reference = recorded(case, method)
    valid = np.arange(reference["tokens"].shape[1]) < reference["lengths"][:, None]
    got = np.asarray(jax.jit(model.apply)({"params": params}, reference["tokens"], valid))[valid]
    record_property("relative_difference", relative_difference(reference["logits"], got))
    assert relative_difference(reference["logits"], got) <= ROUNDED


@pytest.mark.parametrize("case", ["gemma3_text", "llama", "llama_linear", "mixtral", "opt"])
def test_greedy_tokens_are_still_torchs(case):
    """Through the key/value cache; the recorded choices are all clear ones."""
    model, params, reference = recorded(case, "hadamard")
    prompts = [row[:length].tolist() for row, length in zip(reference["tokens"], reference["prompts"], strict=True)]
    new = generate(model, params, prompts, max_new_tokens=reference["greedy"].shape[1], stop_ids=())
    assert new == reference["greedy"].tolist()
