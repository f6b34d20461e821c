"""Everything on the way to packed weights, put together by name: what it gives, and what it refuses with the reason."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.allocation import uniform_plan
from lq.calibration.calls import calls_in_block
from lq.calibration.data import Windows
from lq.calibration.stream import embed_batches
from lq.errors import UserError
from lq.models.context import context_for
from lq.models.decoder import Decoder
from lq.models.matrices import matrices, other_weights
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.pipeline import Pipeline
from lq.quantizers.block import dense

CONFIG = llama_config(blocks=2)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32), np.int32)
WINDOWS = Windows(TOKENS, "random", "random tokens")
SPEC = QuantSpec(bits=3, group_size=32)


def quantized(pipeline, spec=SPEC, config=CONFIG):
    """The packed source and its plan, on a random model."""
    source = InMemory(config, random_params(config))
    return pipeline.quantized(source, uniform_plan(config, spec), WINDOWS, batch_size=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"transforms": ["awq", "hadamard"], "method": "gptq"},
            "hadamard after awq would mix the channels that it scaled",
        ),
        ({"transforms": ["awq", "smoothquant"]}, "awq and smoothquant both scale the channels; keep one"),
        ({"transforms": ["smoothquant"], "method": "awq"}, "awq scales the channels itself; write scale: false"),
        (
            {"transforms": ["hadamard", "fold_norms"]},
            "fold_norms comes first; hadamard folds the norms it needs itself",
        ),
        ({"transforms": ["hadamard", "hadamard"]}, "hadamard is listed twice; keep one"),
        ({"transforms": ["hadamrd"]}, "unknown transform 'hadamrd'; known: fold_norms, hadamard"),
        ({"transforms": [{"seed": 1}]}, "has no name; write for example"),
        ({"transforms": [{"name": "hadamard", "sed": 1}]}, "transform hadamard: unknown option 'sed'"),
        ({"method": "gptq", "options": {"damp": 1}}, "quantizer gptq: unknown option 'damp'"),
        ({"propagate": False}, "propagate: rtn reads no calibration text; leave it out"),
        (
            {"method": "gptq", "options": {"propagate": True}, "propagate": False},
            "propagate: false, and another one as an option of gptq; keep one",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(given, message):
    with pytest.raises(UserError) as caught:
        Pipeline.read(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "spec", "message"),
    [
        ("hqq", {"symmetric": True}, "hqq: optimizes zero points, and symmetric codes have none"),
        ("gptq", {"mixed": True}, "mixed: gptq cannot choose widths for runs of channels; write method baq"),
        (
            "hqq",
            {},
            "hqq: its zero points are no codes, and rounded to codes they lose all it gains; write a",
        ),
        (
            "autoround",
            {"zero_dtype": "bfloat16"},
            "zero_dtype: autoround chooses zero points that are codes, for which",
        ),
        (
            "flexround",
            {"zero_dtype": "float16"},
            "zero_dtype: flexround chooses zero points that are codes, for which",
        ),
        (
            "awq",
            {"zero_dtype": "bfloat16"},
            "zero_dtype: awq chooses zero points that are codes, for which",
        ),
        (
            "baq",
            {"mixed": True},
            "baq: no matrix of this model has runs of channels to choose widths for; that",
        ),
        ("baq", {}, "baq: chooses widths for runs of channels, for which these specs have no room; write mixed"),
    ],
)
def test_methods_and_specs_that_do_not_go_together(method, spec, message):
    plan = uniform_plan(CONFIG, dataclasses.replace(SPEC, **spec))
    with pytest.raises(UserError, match=f"^{message}"):
        Pipeline.read(method).check(CONFIG, plan)


def test_options_of_a_scaling_are_checked_before_any_work():
    symmetric = uniform_plan(CONFIG, dataclasses.replace(SPEC, symmetric=True))
    pipeline = Pipeline.read("gptq", transforms=[{"name": "awq", "convention": "asym"}])
    pipeline.check(CONFIG, uniform_plan(CONFIG, SPEC))
    with pytest.raises(UserError, match=r"^awq: convention 'asym' does not fit symmetric codes; write symu or symr"):
        pipeline.check(CONFIG, symmetric)


def test_matrices_that_keep_one_width_are_named():
    """Only the down projection has more than 128 input channels, in runs of 128."""
    config, notes = dataclasses.replace(llama_config(1), intermediate_size=256), []
    plan = uniform_plan(config, dataclasses.replace(SPEC, mixed=True))
    Pipeline.read("baq").quantized(InMemory(config, {}), plan, WINDOWS, note=notes.append)
    assert len(notes) == 2
    assert notes[1].startswith("mixed: 6 of 7 matrices keep one width (block_0/attention/")


def test_names():
    assert Pipeline.read("gptq", {}, ["hadamard"], True).name == "hadamard + gptq + bias correction"
    assert Pipeline.read("awq").name == "awq"
    assert Pipeline.read("gptq", {}, ["awq"]).name == "awq + gptq"


def test_a_record_tells_pipelines_apart():
    given = [
        {},
        {"method": "gptq"},
        {"method": "gptq", "transforms": ["hadamard"]},
        {"method": "gptq", "transforms": [{"name": "hadamard", "seed": 1}]},
        {"method": "gptq", "transforms": ["awq"]},
        {"method": "gptq", "bias_correction": True},
        {"method": "gptq", "options": {"damping": 0.02}},
        {"transforms": ["awq"]},
        {"transforms": ["awq"], "propagate": True},
    ]
    records = [str(Pipeline.read(**fields).to_dict()) for fields in given]
    assert len(set(records)) == len(given)


@pytest.mark.parametrize(
    ("given", "propagate"),
    [
        ({}, None),
        ({"method": "gptq"}, True),
        ({"method": "awq"}, False),
        ({"method": "autoround"}, True),
        ({"transforms": ["awq"]}, False),
        ({"method": "hqq", "transforms": ["smoothquant"]}, False),
        ({"transforms": ["awq"], "bias_correction": True}, True),
        ({"method": "gptq", "options": {"propagate": False}}, False),
        ({"method": "gptq", "propagate": False}, False),
        ({"method": "gptq", "options": {"propagate": False}, "propagate": False}, False),
        ({"transforms": ["awq"], "propagate": True}, True),
        ({"options": {"clip": "opt", "importance": True}}, False),
    ],
)
def test_whether_calibration_goes_through_quantized_blocks_is_recorded(given, propagate):
    recipe = Pipeline.read(**given).recipe
    assert recipe.propagate is propagate
    assert recipe.to_dict().get("propagate") is propagate
    assert getattr(recipe.options, "propagate", propagate) is propagate, "of two there is one"


def test_bias_correction_leaves_no_mean_error():
    """What a matrix of the quantized model gives, on what it is applied to there, is the original's on average."""
    source, plan = quantized(Pipeline.read("rtn", {"clip": "none"}, bias_correction=True))
    config = source.config
    assert plan.other_weights == other_weights(config) > other_weights(CONFIG)
    packed, original = dense(source.block(0)), dense(random_params(CONFIG)["block_0"])
    h = np.concatenate(embed_batches(source, TOKENS, 2))
    paths = [path.removeprefix("block_0/") for path in matrices(CONFIG) if path.startswith("block_0/")]
    methods = dict.fromkeys(paths, "__call__")
    calls = calls_in_block(config, config.kinds[0], packed, jnp.asarray(h), context_for(TOKENS), methods)
    for path in paths:
        part, name = path.split("/")
        x = np.asarray(calls[path].args[0], np.float64).reshape(-1, original[part][name]["kernel"].shape[0])
        bias = np.asarray(packed[part][name]["bias"], np.float64)
        error = x @ np.asarray(packed[part][name]["kernel"] - original[part][name]["kernel"], np.float64)
        assert np.abs(error.mean(0)).max() > 0.001, "there is something to correct"
        # What is left is the rounding of this bias and of those before it to bfloat16.
        assert (np.abs(error.mean(0) + bias) <= 2.0**-7 * np.abs(bias).max() + 1e-5).all(), path


@pytest.mark.parametrize(
    "transforms", [["fold_norms"], ["hadamard"], [{"name": "hadamard", "down": True, "heads": True}]]
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_transformed_model_at_eight_bits_is_the_original(transforms, method):
    source, plan = quantized(Pipeline.read(method, {}, transforms), dataclasses.replace(SPEC, bits=8))
    assert plan.nbytes > 0
    logits = Decoder(source.config, jnp.float32).apply({"params": source.params()}, TOKENS)
    wanted = Decoder(CONFIG, jnp.float32).apply({"params": random_params(CONFIG)}, TOKENS)
    # Eight bits in groups of 32 are off by 1/500 of a group's range; over two random blocks 2 % of the logits' spread.
    assert np.abs(np.asarray(logits - wanted)).max() < 0.02 * float(np.ptp(np.asarray(wanted)))


def test_a_low_rank_residual_is_counted_and_helps():
    spec = dataclasses.replace(SPEC, bits=2)
    source, plain = quantized(Pipeline.read("gptq"), spec)
    richer, plan = quantized(Pipeline.read("gptq"), dataclasses.replace(spec, rank=8))
    assert plan.nbytes > plain.nbytes
    original = jnp.asarray(random_params(CONFIG)["block_0"]["mlp"]["up_proj"]["kernel"], jnp.float32)
    errors = [
        float(jnp.square(s.block(0)["mlp"]["up_proj"]["kernel"].dequantize() - original).sum())
        for s in (source, richer)
    ]
    assert errors[1] < errors[0]
