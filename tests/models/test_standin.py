"""The shipped model, and the second: their size, that they learned something, that transformers opens the first."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lq.assets import ASSETS
from lq.calibration.data import evaluation_windows
from lq.evaluation import evaluate
from lq.models.decoder import Decoder
from lq.models.loading import load_tokenizer, open_checkpoint

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "standin"
CURVES = {name: json.loads((HERE / f"curve-{name}.json").read_text()) for name in ("standin", "narrow")}


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(ASSETS / "standin")


def test_size_and_shape(checkpoint):
    config = checkpoint.config
    assert (ASSETS / "standin" / "model.safetensors").stat().st_size <= 25_000_000
    assert 12 <= config.num_blocks <= 24
    assert 4096 <= config.vocab_size <= 8192
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0


@pytest.mark.parametrize(("name", "place"), [("standin", ASSETS), ("narrow", HERE)])
def test_it_is_worth_quantizing(name, place):
    """Measured here on shipped text, against the unigram perplexity recorded when it was trained."""
    checkpoint, curve = open_checkpoint(place / name), CURVES[name]
    text = str(ASSETS / "texts" / "evaluation.txt")
    windows = evaluation_windows(load_tokenizer(checkpoint.path), text, 512, limit=8)
    assert evaluate(checkpoint, windows).perplexity <= curve["unigram_perplexity"] / 3
    assert curve["curve"][-1]["validation_perplexity"] <= curve["unigram_perplexity"] / 3


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_the_curve_was_still_falling_but_slowly(curve):
    perplexity = [row["validation_perplexity"] for row in curve["curve"]]
    assert perplexity == sorted(perplexity, reverse=True)
    assert perplexity[-2] / perplexity[-1] < 1.02
    assert perplexity[0] / perplexity[1] > 1.5  # what falling fast looks like


def test_the_second_model_is_another_with_the_same_tokenizer(checkpoint):
    second = open_checkpoint(HERE / "narrow").config
    assert (second.num_blocks, second.hidden_size) != (checkpoint.config.num_blocks, checkpoint.config.hidden_size)
    tokenizers = [(place / "tokenizer.json").read_bytes() for place in (ASSETS / "standin", HERE / "narrow")]
    assert tokenizers[0] == tokenizers[1]


def test_calibration_and_evaluation_text_are_different_files():
    sources = json.loads((ASSETS / "texts" / "sources.json").read_text())
    calibration, evaluation = (set(sources["files"][split]) for split in ("calibration", "evaluation"))
    assert calibration
    assert evaluation
    assert not calibration & evaluation
    for row in sources["sources"]:
        assert (ASSETS / "texts" / "licences" / f"{row['source']}.txt").is_file(), f"no licence for {row['source']}"


def test_transformers_opens_it_and_gives_the_same_logits(checkpoint):
    torch = pytest.importorskip("torch", reason="needs torch; every family is compared with recorded logits as well")
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(1, 4096, (2, 100))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    got = np.asarray(Decoder(checkpoint.config, jnp.float32).apply({"params": checkpoint.params()}, tokens))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
