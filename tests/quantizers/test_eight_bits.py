"""A model whose matrices have 8 bits is the original to within 1 % of its perplexity, whichever quantizer made it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.evaluation.evaluate import evaluate, make_reference
from lq.models.decoder import Decoder
from lq.models.matrices import matrices, model_shapes
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, Recipe, quantized_source
from lq.quantizers.block import dense

pytestmark = [pytest.mark.once, pytest.mark.long]

# All matrices have one shape, so that a method compiles once, with the 256 channels that widths of their own need.
CONFIG = dataclasses.replace(llama_config(2, 256, tied=False), intermediate_size=256, num_kv_heads=4, vocab_size=512)
FEW_STEPS = {"steps": 20, "batch_size": 2}  # of methods that learn; where that does harm they keep their start


def model():
    """Random, but with states that blocks add to and do not drown, and logits that leave a choice of few tokens."""
    params = random_params(CONFIG)
    params["embed"]["tokens"]["embedding"] *= 512**0.5
    params["head"]["kernel"] *= 4
    return params


@jax.jit
def continued(params, tokens):
    """`tokens` with all but the first of each row replaced by what the model draws."""

    def step(t, tokens):
        logits = Decoder(CONFIG).apply({"params": params}, tokens)
        drawn = jax.random.categorical(jax.random.fold_in(jax.random.key(0), t), logits[:, t - 1])
        return tokens.at[:, t].set(drawn)

    return jax.lax.fori_loop(1, tokens.shape[1], step, tokens)


@pytest.fixture(scope="module")
def original():
    """The model, text of its own to calibrate on and to judge by, and what it makes of the latter.

    On text drawn from the original the logarithm of the ratio of perplexities is on average the KL divergence, so that
    1 % is 0.01 nats.
    """
    source = InMemory(CONFIG, dense(model()))
    first = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (60, 32), np.int32)
    text = np.asarray(continued(source.params(), jnp.asarray(first)))
    calibration, others = (Windows(rows, "the model's own", "drawn") for rows in (text[:24], text[24:]))
    reference = make_reference(source, others)
    return source, calibration, others, reference, evaluate(source, others).perplexity


def spec_of(method: str, options, bits: int) -> QuantSpec:
    """With what a method asks for: zero points that are numbers, or widths of its own, on average 7 at most."""
    spec = QuantSpec(bits=bits, group_size=32)
    if QUANTIZERS[method].segments is not None:
        return dataclasses.replace(spec, bits=min(bits, 7), mixed=True)
    fractional = QUANTIZERS[method].fractional(options, spec)
    return dataclasses.replace(spec, zero_dtype="bfloat16") if fractional else spec


def judged(original, method: str, bits: int) -> tuple[float, float]:
    """By how much the perplexity is another, as a share, and the KL divergence in nats."""
    source, calibration, text, reference, perplexity = original
    known = {field.name for field in dataclasses.fields(QUANTIZERS[method].options)}
    few = {key: value for key, value in FEW_STEPS.items() if key in known}
    options = QUANTIZERS.options(method, few)
    specs = dict.fromkeys(matrices(CONFIG), spec_of(method, options, bits))
    quantized = quantized_source(source, specs, Recipe(method=method, options=options), calibration, batch_size=4)
    # Unpacked, so that all are judged by one program.
    found = evaluate(InMemory(CONFIG, dense(quantized.params())), text, reference=reference)
    return found.perplexity / perplexity - 1, found.kl


@pytest.mark.parametrize("method", QUANTIZERS)
def test_perplexity_is_within_a_hundredth_of_the_originals(method, original):
    """Measured: 0.2 % at most; 0.0004 nats, and 0.0015 of the 7 bits on average of `baq`."""
    change, kl = judged(original, method, 8)
    assert abs(change) <= 0.01
    assert kl <= 0.005


@pytest.mark.parametrize("method", ["awq", "autoround"])
def test_embedding_and_head_too(method, original):
    """Both are of the same method: a lookup, and the matrix behind the final norm."""
    source, calibration, text, reference, perplexity = original
    options = QUANTIZERS.options(method, FEW_STEPS if QUANTIZERS[method].block else {})
    specs = dict.fromkeys(model_shapes(CONFIG), QuantSpec(bits=8, group_size=32))
    recipe = Recipe(method=method, options=options)
    packed = quantized_source(source, specs, recipe, calibration, batch_size=4).params()
    found = evaluate(InMemory(CONFIG, packed), text, reference=reference)
    assert abs(found.perplexity / perplexity - 1) <= 0.01
    assert found.kl <= 0.005


def test_five_bits_are_not_that_near(original):
    change, kl = judged(original, "rtn", 5)
    assert change > 0.01
    assert kl > 0.01
