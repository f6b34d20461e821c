"""Channel lines: which there are in each family, and that folding one changes nothing that the block computes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import CASES, blocks_of, states
from small_models import llama_config, random_params

from lq.calibration.calls import calls_in_block, expert_of_rows
from lq.models.config import ModelConfig
from lq.models.context import context_for
from lq.models.decoder import apply_block
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_matrix
from lq.quantizers.channel_lines import Line, channel_lines, fold, leaf_at
from lq.quantizers.rtn import RTNOptions

pytestmark = pytest.mark.once

# Doubles carry 1.1e-16; of a few thousand roundings one after another nothing near this is left.
EXACT = 1e-10

ATTENTION = {
    "attention_norm": "attention: attention/q_proj attention/k_proj attention/v_proj",
    "attention/v_proj": "attention/o_proj: attention/o_proj",
}
GATED = {"mlp_norm": "mlp: mlp/gate_proj mlp/up_proj", "mlp/up_proj": "mlp/down_proj: mlp/down_proj"}
ROUTED = {"mlp_norm": "moe: moe/gate_proj moe/up_proj moe/router", "moe/up_proj": "moe/down_proj: moe/down_proj"}
PLAIN = {"mlp_norm": "mlp: mlp/up_proj"}
FEED_FORWARD = {
    "gpt2": [PLAIN],  # GELU
    "opt": [PLAIN | {"mlp/up_proj": "mlp/down_proj: mlp/down_proj"}],  # ReLU
    "mixtral": [ROUTED],
    "qwen3_moe": [ROUTED, GATED],
}


def relative(got, want) -> float:
    return float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max())


def random_scale(line: Line, seed: int):
    return jnp.asarray(np.exp(np.random.default_rng(seed).uniform(-2, 2, line.shape)))


@pytest.mark.parametrize("case", CASES)
def test_lines_of_each_family(case):
    found = []
    for config, kind, params in blocks_of(case, "float32"):
        lines = channel_lines(config, kind)
        readers = {line.producer: [*line.readers, *([line.router] if line.router else [])] for line in lines}
        found.append({line.producer: f"{line.inspected}: {' '.join(readers[line.producer])}" for line in lines})
        for line in lines:
            for path in line.readers:
                kernel = leaf_at(params, path)["kernel"]
                assert kernel.shape[-2] == line.channels * line.sharing
    expected = [ATTENTION | feed_forward for feed_forward in FEED_FORWARD.get(case, [GATED])]
    assert [lines for i, lines in enumerate(found) if lines not in found[:i]] == expected


@pytest.mark.parametrize("case", CASES)
def test_folding_changes_nothing_but_the_tensor_between(case):
    """In float64: each line by itself, then all of them, leave the block's output; the readers see x / s."""
    with jax.enable_x64(True):
        for config, kind, params in blocks_of(case, "float64"):
            h, tokens = states(config, dtype="float64")
            context = context_for(tokens)
            run = lambda params: apply_block(config, kind, params, h, context)  # noqa: B023, E731
            want, folded = run(params), params
            assert want.dtype == jnp.float64
            for seed, line in enumerate(channel_lines(config, kind)):
                scale = random_scale(line, seed)
                alone, folded = fold(params, line, scale), fold(folded, line, scale)
                assert relative(run(alone), want) < EXACT, line.producer
                tensors = []
                for tree in (params, alone):
                    methods = {line.inspected: "__call__"}
                    tensors.append(calls_in_block(config, kind, tree, h, context, methods)[line.inspected].args)
                rows = line.spread(scale)
                if line.experts is not None:
                    rows = rows[expert_of_rows(tensors[0][1], tensors[0][0].shape[0])]
                assert relative(tensors[1][0] * rows, tensors[0][0]) < EXACT, line.producer
            assert relative(run(folded), want) < EXACT


def test_scales_of_a_shared_key_value_head_reach_its_own_query_heads():
    """Six query heads of two channels over three key/value heads: heads 0 and 1 read the first."""
    line = Line(producer="v", readers=("o",), inspected="o", channels=6, sharing=2, head_dim=2)
    scale = np.asarray([1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(line.spread(scale), [1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6])
    values = np.arange(12)
    np.testing.assert_array_equal(line.gather(values), [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]])
    np.testing.assert_array_equal(line.gather(line.spread(scale)), [scale, scale])


def test_a_gain_stored_less_one_is_divided_as_a_whole():
    line = Line(producer="n", readers=(), inspected="m", channels=3, norm_offset=1.0)
    stored = jnp.asarray([0.0, 1.0, -0.5])
    folded = fold({"n": {"scale": stored}}, line, jnp.asarray([2.0, 4.0, 0.5]))
    np.testing.assert_array_equal(folded["n"]["scale"], [1 / 2 - 1, 2 / 4 - 1, 0.5 / 0.5 - 1])


def test_the_bias_of_a_layer_norm_is_divided_too():
    line = Line(producer="n", readers=("m",), inspected="m", channels=2)
    params = {"n": {"scale": jnp.ones(2), "bias": jnp.asarray([3.0, 8.0])}, "m": {"kernel": jnp.ones((2, 1))}}
    folded = fold(params, line, jnp.asarray([2.0, 4.0]))
    np.testing.assert_array_equal(folded["n"]["bias"], [1.5, 2.0])
    np.testing.assert_array_equal(folded["m"]["kernel"], [[2.0], [4.0]])
    np.testing.assert_array_equal(params["n"]["scale"], [1, 1], err_msg="what was given is left alone")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_an_activation_that_is_not_homogeneous_has_no_line(activation):
    """And rightly so: the line of a ReLU would change the block by more than a hundredth."""
    config, kind, params = next(iter(blocks_of("opt", "float32")))
    line = channel_lines(config, kind)[-1]
    assert line.producer == "mlp/up_proj"
    smooth = dataclasses.replace(config, activation=activation)
    assert [line.producer for line in channel_lines(smooth, kind)] == ["attention_norm", "attention/v_proj", "mlp_norm"]
    h, tokens = states(config)
    before, after = (
        apply_block(smooth, kind, tree, h, context_for(tokens))
        for tree in (params, fold(params, line, random_scale(line, 0)))
    )
    assert relative(after, before) > 0.01


@dataclasses.dataclass(frozen=True)
class Rotation:
    heads: bool = False
    down: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedConfig(ModelConfig):
    rotation: Any = None


@pytest.mark.parametrize(
    ("rotation", "missing"),
    [(Rotation(heads=True), "attention/v_proj"), (Rotation(down=True), "mlp/up_proj"), (Rotation(), None)],
)
def test_no_scale_passes_through_a_rotation(rotation, missing):
    config = llama_config(1)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    rotated = RotatedConfig(**fields | {"rotation": rotation})
    producers = [line.producer for line in channel_lines(rotated, config.kinds[0])]
    assert producers == [line.producer for line in channel_lines(config, config.kinds[0]) if line.producer != missing]


def test_a_scale_of_another_shape_and_a_packed_matrix_are_refused():
    config = llama_config(1)
    params = random_params(config, dtype=jnp.float32)["block_0"]
    line = channel_lines(config, config.kinds[0])[1]
    assert line.shape == (32,)
    with pytest.raises(ValueError, match=r"a scale \(64,\) for attention/v_proj, whose line takes \(32,\)"):
        fold(params, line, jnp.ones(64))
    kernel = params["attention"]["o_proj"]["kernel"]
    packed = quantize_matrix(kernel, None, QuantSpec(bits=4, group_size=32), "rtn", RTNOptions(clip="none"))
    params["attention"]["o_proj"]["kernel"] = packed
    with pytest.raises(ValueError, match="attention/o_proj is packed"):
        fold(params, line, jnp.ones(32))
