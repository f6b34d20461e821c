"""`lq eval` on its own: sizes in the stored dtype, and one line for what does not fit."""

import dataclasses

import jax.numpy as jnp
import pytest
from small_models import llama_config, random_params, write_directory

import lq
from lq.errors import UserError
from lq.models.matrices import parameter_count
from lq.runs.single import evaluate_one

pytestmark = pytest.mark.once

SETTINGS = {"window": 32, "stride": None, "limit": 2, "batch_size": 2, "dtype": "float32"}


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.bfloat16, 2), (jnp.float32, 4)])
def test_the_size_is_that_of_the_stored_dtype(tmp_path, text_file, dtype, itemsize):
    config = llama_config(1)
    path = write_directory(tmp_path / "model", config, random_params(config, dtype=dtype))
    facts = evaluate_one(str(path), str(text_file), original=None, **SETTINGS)
    assert facts["bits per weight"] == facts["code bits"] == 8 * itemsize
    assert facts["counted in bits per weight"] == "the blocks' matrices"
    assert facts["bytes on device"] == itemsize * parameter_count(config)
    assert facts["bytes on disk"] >= facts["bytes on device"]
    assert facts["tokens scored"] == 2 * 31


@pytest.mark.parametrize(
    ("count", "words"), [("blocks", "the blocks' matrices"), ("all", "the blocks' matrices, embedding and head")]
)
def test_what_is_counted_is_that_of_the_plan(small_model, text_file, tmp_path, count, words):
    model, params, _ = lq.load(small_model.path)
    plan = lq.allocate(lq.score(model, params, metric="zd"), bits=[4], embedding_bits=8, count=count)
    lq.save(tmp_path / "q", model, lq.quantize(model, params, plan), plan, original=small_model.path, method="rtn")
    facts = evaluate_one(str(tmp_path / "q"), str(text_file), original=None, **SETTINGS)
    assert facts["counted in bits per weight"] == words
    assert facts["bits per weight"] == plan.bpw
    assert (facts["code bits"] > 4) == (count == "all")


def test_an_original_with_another_vocabulary_is_named(small_model, text_file, tmp_path):
    config = dataclasses.replace(llama_config(1), vocab_size=5000)
    other = str(write_directory(tmp_path / "other", config, random_params(config)))
    said = f"--original {other}: a vocabulary of 5000 tokens, that of {small_model.path} has 4096; give the model it"
    with pytest.raises(UserError) as error:
        evaluate_one(str(small_model.path), str(text_file), original=other, **SETTINGS)
    assert str(error.value).startswith(said)


def test_a_window_beyond_the_context_is_refused_before_the_text_is_read(small_model):
    with pytest.raises(UserError, match="window of 129 tokens: the model's context is 128; write a smaller window"):
        evaluate_one(str(small_model.path), "none.txt", original=None, **{**SETTINGS, "window": 129})
