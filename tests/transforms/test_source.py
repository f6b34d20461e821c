"""Transforming as a model is read: each part on its own, the dtypes of what comes, packed parts refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from random_models import RECORDED, TOKENS, random_model
from small_models import llama_config, random_params

import lq
from lq.errors import UserError
from lq.models.decoder import Decoder
from lq.models.loading import open_checkpoint
from lq.models.source import ParameterSource
from lq.transforms import TransformedSource, transform

pytestmark = pytest.mark.once

EVERYWHERE = {"heads": True, "down": True}


class OnePart(ParameterSource):
    """A model of which one part alone can be read."""

    def __init__(self, source: ParameterSource, name: str):
        self.config, self._source, self._name = source.config, source, name

    def part(self, name: str, dtype=None):
        assert name == self._name
        return self._source.part(name, dtype)


@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "opt", "gpt2", "llama_linear"])
def test_one_part_at_a_time_equals_the_whole(case):
    checkpoint = open_checkpoint(RECORDED / case)
    config, whole = transform(checkpoint.config, checkpoint.params(), "hadamard", EVERYWHERE)
    for name, expected in whole.items():
        source = TransformedSource(OnePart(checkpoint, name), "hadamard", EVERYWHERE)
        assert source.config == config
        jax.tree.map(np.testing.assert_array_equal, source.part(name), expected)
    assert set(whole) == set(checkpoint.params())


def test_leaves_that_change_are_float32_and_others_stay():
    """bfloat16 weights, embeddings tied: the stream is rotated as the model runs."""
    config = llama_config()
    params = random_params(config)
    old, new = (flatten_dict(p, sep="/") for p in (params, transform(config, params, "hadamard")[1]))
    for path, leaf in new.items():
        changed = path.startswith("block")
        assert leaf.dtype == (jnp.float32 if changed else jnp.bfloat16), path
        if not changed:
            np.testing.assert_array_equal(leaf, old[path])
    for path, leaf in flatten_dict(transform(config, params, "hadamard", dtype=jnp.bfloat16)[1], sep="/").items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, new[path].astype(jnp.bfloat16))


def test_float32_is_the_float64_result_rounded_once():
    config, params = random_model("mixtral, untied")
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    rounded = transform(config, single, "hadamard", EVERYWHERE)[1]
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), single)
        exact = transform(config, double, "hadamard", EVERYWHERE)[1]
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_array_equal(a, np.asarray(b).astype(np.float32))


def test_the_original_is_left_alone():
    config, params = llama_config(tied=False), random_params(llama_config(tied=False))
    before = jax.tree.map(lambda leaf: np.asarray(leaf).copy(), params)
    model, new = lq.transform(Decoder(config, jnp.float32), params, "hadamard", seed=1)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert model == Decoder(config, jnp.float32)
    assert not np.array_equal(new["head"]["kernel"], params["head"]["kernel"])


def test_the_librarys_front_does_it_too():
    config, params = llama_config(), random_params(llama_config(), dtype=jnp.float32)
    model, new = lq.transform(Decoder(config), params, "hadamard", seed=2, down=True)
    assert model.config.rotation.seed == 2
    before = np.asarray(Decoder(config).apply({"params": params}, TOKENS))
    after = np.asarray(model.apply({"params": new}, TOKENS))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    low = lq.transform(Decoder(config), params, "fold_norms", dtype=jnp.bfloat16)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(UserError, match=r"unknown transform 'hadamrd'; known: [^\n]*; did you mean hadamard"):
        lq.transform(Decoder(config), params, "hadamrd")


@pytest.mark.parametrize("prepared", [False, True])
def test_packed_parameters_are_refused(prepared):
    model, params = Decoder(llama_config()), random_params(llama_config())
    packed = lq.quantize(model, params, lq.uniform_plan(model.config, lq.QuantSpec(bits=4)))
    with pytest.raises(UserError, match=r"^block_0/attention/[^\n]* is packed; transform the original model, and "):
        lq.transform(model, lq.prepare(packed) if prepared else packed, "hadamard")
