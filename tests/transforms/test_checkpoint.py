"""A transformed model that was quantized and written is read back as what it is; damage to the record is one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from random_models import MODELS, RECORDED, TOKENS, config_of

import lq
from lq.allocation import adapted, uniform_plan
from lq.checkpoint import open_quantized, write_quantized
from lq.checkpoint.quantized import measured_bits_per_weight
from lq.checkpoint.transformed import CHANGEABLE, differing_fields
from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.decoder import Decoder
from lq.models.loading import open_checkpoint
from lq.models.matrices import other_weights
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.sealed import unsealed
from lq.transforms import TransformedSource

pytestmark = pytest.mark.once

SPEC = QuantSpec(bits=4, group_size=32)
RTN = Recipe()
RECORD = {"method": "rtn", "options": {}}
EVERYWHERE = {"heads": True, "down": True}


def planned(case: str, method: str = "hadamard", options: dict | None = None):
    """The transformed model of a recorded checkpoint, quantized as it is read, and the plan."""
    source = TransformedSource(open_checkpoint(RECORDED / case), method, options)
    plan = adapted(uniform_plan(config_of(case), SPEC), source.config)
    return PlannedSource(source, plan.specs, RTN), plan


def write(case: str, out, options: dict | None = None, **kwargs):
    source, plan = planned(case, options=options)
    write_quantized(source, plan, out, quantizer=RECORD, description=RECORDED / case, **kwargs)
    return source


@pytest.mark.long
@pytest.mark.parametrize("case", ["llama", "llama_linear", "mixtral", "qwen3_moe", "opt", "gpt2"])
def test_it_is_read_back_as_it_was_in_memory(case, tmp_path):
    source = write(case, tmp_path / "q", EVERYWHERE)
    checkpoint = open_quantized(tmp_path / "q")
    assert checkpoint.config == source.config
    assert measured_bits_per_weight(checkpoint) == checkpoint.plan.bpw
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params())) == checkpoint.plan.nbytes
    logits = [np.asarray(Decoder(s.config).apply({"params": s.params()}, TOKENS)) for s in (checkpoint, source)]
    np.testing.assert_array_equal(*logits)


def test_the_front_writes_and_opens_it_too(tmp_path):
    original = open_checkpoint(RECORDED / "opt")
    model, params = lq.transform(Decoder(original.config), original.params(), "hadamard", seed=3, down=True)
    plan = lq.uniform_plan(model.config, SPEC)
    packed = lq.quantize(model, params, plan)
    lq.save(tmp_path / "q", model, packed, plan, original=RECORDED / "opt", method="rtn")
    opened = lq.open_model(tmp_path / "q")
    assert opened.config == model.config
    got = Decoder(opened.config).apply({"params": opened.params()}, TOKENS)
    np.testing.assert_array_equal(got, model.apply({"params": packed}, TOKENS))


def manifest(out) -> dict:
    return unsealed(json.loads((out / "lq.json").read_text()))


def test_the_manifest_says_what_changed_and_no_more(tmp_path):
    write("opt", tmp_path / "opt", {"seed": 9})
    assert manifest(tmp_path / "opt")["transformed"] == {
        "norm": "rmsnorm",
        "final_norm": "layernorm",
        "center_embeddings": True,
        "rotation": {"seed": 9, "residual": True, "heads": False, "down": False},
    }
    write("llama", tmp_path / "llama")
    assert "transformed" not in manifest(tmp_path / "llama"), "everything was folded: a llama like any other"


def test_another_rotation_is_another_write(tmp_path):
    """An interrupted one is not gone on with under another seed."""

    def killed(part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("llama_linear", tmp_path / "q", {"seed": 0}, on_part=killed)
    with pytest.raises(UserError, match=r"of another transformed\.rotation\.seed \(0 there, 1 here\)"):
        write("llama_linear", tmp_path / "q", {"seed": 1}, resume=True)
    source = write("llama_linear", tmp_path / "q", {"seed": 0}, resume=True)
    assert open_quantized(tmp_path / "q").config == source.config


def test_sizes_are_none_of_what_a_transform_may_change():
    assert set(CHANGEABLE) < {field.name for field in dataclasses.fields(ModelConfig)}
    changed = set()
    for model in MODELS:
        config = config_of(model)
        options = {**EVERYWHERE, "residual": not config.post_norms}
        for name, given in (("hadamard", options), ("add_biases", {})):
            changed |= set(differing_fields(config, TransformedSource(InMemory(config, {}), name, given).config))
    assert changed == set(CHANGEABLE)


def test_a_description_of_another_model_is_still_refused(tmp_path):
    source, plan = planned("llama_linear")
    shutil.copytree(RECORDED / "llama_linear", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"other/config\.json: of another model [^\n]* \(they differ in norm_eps\)"):
        write_quantized(source, plan, tmp_path / "q", quantizer=RECORD, description=tmp_path / "other")
    assert not (tmp_path / "q").exists()


def test_a_plan_is_adapted_to_other_norms_and_biases(tmp_path):
    config = config_of("opt")
    plan = uniform_plan(config, SPEC, model="original")
    new = TransformedSource(open_checkpoint(RECORDED / "opt"), "hadamard").config
    with pytest.raises(UserError, match="plan: made for another model"):
        write_quantized(planned("opt")[0], plan, tmp_path / "q", quantizer=RECORD, description=RECORDED / "opt")
    fitting = adapted(plan, new)
    assert fitting == dataclasses.replace(plan, other_weights=other_weights(new))
    # Two LayerNorms a block have lost their biases.
    assert plan.other_weights - fitting.other_weights == 2 * config.num_blocks * config.hidden_size
    assert adapted(plan, new, model="rotated").model == "rotated"
    with pytest.raises(UserError, match="plan: made for another model; make it from this model's scores"):
        adapted(plan, config_of("llama"))


ROTATION = {"seed": 0, "residual": True, "heads": False, "down": False}


@pytest.mark.parametrize(
    "transformed",
    [
        None,
        [],
        {"hidden_size": 64},
        {"norm": "batchnorm"},
        {"norm": None},
        {"final_norm": ["rmsnorm"]},
        {"final_norm": None},
        {"qkv_bias": 1},
        {"center_embeddings": None},
        {"rotation": None},
        {"rotation": True},
        {"rotation": {}},
        {"rotation": {**ROTATION, "seed": True}},
        {"rotation": {**ROTATION, "seed": 0.5}},
        {"rotation": {**ROTATION, "down": 1}},
        {"rotation": {**ROTATION, "keys": True}},
        {"rotation": {"seed": 0}},
    ],
)
def test_a_damaged_record_is_one_line(transformed, tmp_path):
    write("llama_linear", tmp_path / "q")
    (tmp_path / "q" / "lq.json").write_text(json.dumps(manifest(tmp_path / "q") | {"transformed": transformed}))
    with pytest.raises(UserError, match=r"^[^\n]*lq\.json: damaged \([^\n]*transformed: [^\n]*\); quantize again$"):
        open_quantized(tmp_path / "q")


def test_a_record_that_does_not_fit_the_shards_is_refused(tmp_path):
    """Norms that should have biases have none."""
    write("opt", tmp_path / "q")
    changed = {"transformed": manifest(tmp_path / "q")["transformed"] | {"norm": "layernorm"}}
    (tmp_path / "q" / "lq.json").write_text(json.dumps(manifest(tmp_path / "q") | changed))
    with pytest.raises(UserError, match="of another model than"):
        open_quantized(tmp_path / "q")
