"""Every family against torch transformers: logits with padding on either side, and greedy decoding through the cache.

The references are recorded (`tests/fixtures/record_models.py` says what and how); where torch is installed, the same
comparison is made with fresh models too.
"""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lq.models.decoder import Decoder
from lq.models.families import FAMILIES
from lq.models.generate import generate
from lq.models.loading import open_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(path.parent.name for path in FIXTURES.glob("models/*/reference.safetensors"))
TOLERANCE = 1e-5  # of the largest logit


def relative_error(directory: Path, side: str) -> float:
    """max |lq - torch| / max |torch| over the logits of real tokens, in a batch padded on `side`."""
    checkpoint = open_checkpoint(directory)
    reference = load_file(directory / "reference.safetensors")
    tokens, valid = padded(reference["tokens"], reference["lengths"], side)
    logits = jax.jit(Decoder(checkpoint.config).apply)({"params": checkpoint.params()}, tokens, valid)
    difference = np.asarray(logits)[valid] - reference["logits"]
    return float(np.abs(difference).max() / np.abs(reference["logits"]).max())


def padded(tokens: np.ndarray, lengths: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    width = lengths.max()
    batch, valid = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        at = slice(width - length, None) if side == "left" else slice(0, length)
        batch[row, at], valid[row, at] = tokens[row, :length], True
    return batch, valid


def continuations(directory: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy tokens of lq and of torch."""
    checkpoint = open_checkpoint(directory)
    reference = load_file(directory / "reference.safetensors")
    prompts = [row[:length].tolist() for row, length in zip(reference["tokens"], reference["prompts"], strict=True)]
    expected = reference["greedy"].tolist()
    model, params = Decoder(checkpoint.config), checkpoint.params()
    return generate(model, params, prompts, max_new_tokens=len(expected[0]), stop_ids=()), expected


def test_every_family_is_recorded():
    covered = {open_checkpoint(FIXTURES / "models" / case).config.family for case in CASES}
    assert covered == set(FAMILIES) - {"gemma3"}  # the text model inside it is gemma3_text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_recorded_ones(case, side):
    assert relative_error(FIXTURES / "models" / case, side) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_equal_recorded_ones(case):
    ours, expected = continuations(FIXTURES / "models" / case)
    assert ours == expected


@pytest.mark.parametrize("case", CASES)
def test_fresh_model_equals_torch(case, tmp_path, record_property):
    pytest.importorskip("torch", reason="fresh references need torch; the recorded ones were compared above")
    record = runpy.run_path(str(FIXTURES / "record_models.py"))["record"]
    record(case, tmp_path, first_seed=1000)
    errors = [relative_error(tmp_path, side) for side in ("left", "right")]
    record_property("relative_error", max(errors))
    assert max(errors) <= TOLERANCE
    ours, expected = continuations(tmp_path)
    assert ours == expected
