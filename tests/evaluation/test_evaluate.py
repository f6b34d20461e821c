"""Perplexity, KL and agreement against float64 NumPy on the logits of the whole model."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.models.decoder import Decoder
from lq.models.source import Dequantized, InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe

pytestmark = pytest.mark.once


def make_windows(count=5, length=24, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 4096, (count, length)).astype(np.int32)
    return Windows(tokens, "random", "random")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request):
    config = llama_config(2, tied=request.param)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.fixture(scope="module")
def changed(original):
    return InMemory(original.config, random_params(original.config, seed=1, dtype=jnp.float32))


def log_probabilities(source, tokens):
    logits = np.asarray(Decoder(source.config).apply({"params": source.params()}, tokens), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch_size", [2, 8])
def test_measures_equal_float64(original, changed, batch_size):
    windows = make_windows()
    reference = make_reference(original, windows, batch_size=batch_size)
    got = evaluate(changed, windows, reference=reference, batch_size=batch_size)
    p, q = (log_probabilities(s, windows.tokens)[:, :-1] for s in (original, changed))
    nll = -np.take_along_axis(q, windows.tokens[:, 1:, None], -1).mean()
    # Logits agree to about 1e-6 of their size (3), and each enters a mean.
    assert got.nll == pytest.approx(nll, abs=2e-5)
    assert got.perplexity == pytest.approx(np.exp(nll), rel=2e-5)
    assert got.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert got.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert got.tokens == windows.tokens[:, 1:].size


def test_dequantized_it_is_the_same_model(original):
    specs = {
        f"block_0/mlp/{name}": QuantSpec(bits=bits, group_size=32) for name, bits in (("up_proj", 2), ("down_proj", 3))
    }
    packed, windows = PlannedSource(original, specs, Recipe()), make_windows()
    reference = make_reference(original, windows)
    got, expected = (evaluate(s, windows, reference=reference) for s in (Dequantized(packed), packed))
    # Products with packed weights sum in another order.
    assert got.kl == pytest.approx(expected.kl, rel=1e-4)
    assert got.kl > 1e-4
    assert Dequantized(packed).block(0)["mlp"]["up_proj"]["kernel"].dtype == jnp.float32
    assert Dequantized(packed).block(0, jnp.bfloat16)["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16


def test_the_original_against_itself(original):
    windows = make_windows()
    got = evaluate(original, windows, reference=make_reference(original, windows))
    assert got.kl == pytest.approx(0, abs=1e-6)
    assert got.top1 == 1


@pytest.mark.parametrize("stride", [1, 5, 23, 24])
def test_overlapping_windows_score_every_token_once(original, stride):
    length, stream = 24, np.random.default_rng(3).integers(1, 4096, 100).astype(np.int32)
    starts = range(0, 100 - length + 1, stride)
    windows = Windows(np.stack([stream[s : s + length] for s in starts]), "random", "overlapping", stride)
    got = evaluate(original, windows)
    scores, seen = [], set()
    for s, logs in zip(starts, log_probabilities(original, windows.tokens), strict=True):
        for t in range(1, length):
            if s + t not in seen and (stride < length or t > 0):
                seen.add(s + t)
                scores.append(-logs[t - 1, stream[s + t]])
    assert got.tokens == len(scores)
    assert got.nll == pytest.approx(np.mean(scores), abs=2e-5)


def test_a_packed_model_is_measured_like_its_dequantized_twin(original):
    specs = {"block_0/mlp/up_proj": QuantSpec(bits=3, group_size=32), "embed/tokens": QuantSpec(bits=4, group_size=32)}
    packed = PlannedSource(original, specs, Recipe())
    params = packed.params(jnp.float32)
    up = params["block_0"]["mlp"]["up_proj"]["kernel"]
    params["block_0"]["mlp"]["up_proj"]["kernel"] = up.dequantize()
    params["embed"]["tokens"]["embedding"] = params["embed"]["tokens"]["embedding"].dequantize().T
    dense = InMemory(original.config, params)
    windows = make_windows()
    assert evaluate(packed, windows).nll == pytest.approx(evaluate(dense, windows).nll, rel=1e-6)


def test_a_reference_over_other_tokens_is_refused(original):
    reference = make_reference(original, make_windows(seed=1))
    with pytest.raises(UserError, match="reference: made over other windows"):
        evaluate(original, make_windows(), reference=reference)


def test_a_reference_with_another_vocabulary_is_refused(original):
    import dataclasses

    reference = make_reference(original, make_windows())
    other = dataclasses.replace(reference, config=dataclasses.replace(original.config, vocab_size=5000))
    with pytest.raises(UserError, match="the original's vocabulary has 5000 tokens, the model's 4096; give the orig"):
        evaluate(original, make_windows(), reference=other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0; write 1 or more"),
        ({"batch_size": -2}, "batch_size: -2; write 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(original, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(original, make_windows(), **changes)


def test_windows_beyond_the_context_are_refused(original):
    windows = make_windows(count=1, length=129)
    for measure in (evaluate, make_reference):
        with pytest.raises(UserError, match="window of 129 tokens: the model's context is 128; write a smaller window"):
            measure(original, windows)
