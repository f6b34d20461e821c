"""Parameters laid out for a device give the logits of the canonical ones, from fewer products."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_models import llama_config, random_params

import lq
from lq.models.decoder import Decoder
from lq.models.generate import generate
from lq.models.prepared import prepare, prepared_nbytes
from lq.numerics.matmul import PlusLowRank, matmul
from lq_kernels import PreparedMatrix

pytestmark = pytest.mark.once

TOKENS = np.arange(14)[None] % 7


def packed(bits=4, specs=None, **options):
    """A small model, its packed parameters; `specs` for matrices that differ."""
    config = dataclasses.replace(llama_config(), **options)
    params = random_params(config)
    plan = lq.uniform_plan(config, lq.QuantSpec(bits=bits))
    plan = dataclasses.replace(plan, specs={**plan.specs, **(specs or {})})
    return Decoder(config), lq.quantize(Decoder(config), params, plan)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_logits_are_those_of_the_canonical_layout(options):
    model, qparams = packed(**options)
    assert_same_logits(model, prepare(qparams), qparams)


def assert_same_logits(model, prepared, qparams):
    want = np.asarray(model.apply({"params": qparams}, TOKENS))
    got = np.asarray(model.apply({"params": prepared}, TOKENS))
    assert np.abs(want).max() > 0.1
    # Sums in float32 in another order: some roundings a layer.
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_projections_that_share_their_input_are_one_product():
    model, qparams = packed()
    names = ("q_proj", "k_proj", "v_proj")
    attention = prepare(qparams)["block_0"]["attention"]
    joint = attention["q_proj+k_proj+v_proj"]
    assert isinstance(joint, PreparedMatrix)
    assert joint.splits == tuple(qparams["block_0"]["attention"][name]["kernel"].shape[1] for name in names)
    assert "kernel" not in attention["q_proj"]

    def products(params):
        return str(jax.make_jaxpr(lambda t: model.apply({"params": params}, t))(TOKENS)).count("quantized_matmul[")

    assert products(qparams) == 7 * model.config.num_blocks
    assert products(prepare(qparams)) == 4 * model.config.num_blocks


def test_projections_of_different_widths_stay_apart():
    model, qparams = packed(specs={"block_0/attention/k_proj": lq.QuantSpec(bits=8)})
    prepared = prepare(qparams)
    assert "q_proj+k_proj+v_proj" not in prepared["block_0"]["attention"]
    assert "q_proj+k_proj+v_proj" in prepared["block_1"]["attention"]
    assert_same_logits(model, prepared, qparams)


@pytest.mark.parametrize("fields", [{"symmetric": True}, {"zero_dtype": "bfloat16"}], ids=str)
def test_a_matrix_with_a_residual_is_laid_out_with_its_factors(fields):
    model, qparams = packed(2)
    plain, spec = prepare(qparams), lq.QuantSpec(bits=2, rank=8, **fields)
    for name in ("block_0/attention/k_proj", "block_1/mlp/down_proj"):
        model, qparams = packed(2, specs={name: spec})
        kernel = functools.reduce(lambda tree, key: tree[key], [*name.split("/"), "kernel"], qparams)
        assert kernel.spec == spec
        prepared = prepare(qparams)
        laid_out = functools.reduce(lambda tree, key: tree[key], [*name.split("/"), "kernel"], prepared)
        assert isinstance(laid_out, PlusLowRank)
        assert_same_logits(model, prepared, qparams)
        want = np.asarray(model.apply({"params": plain}, TOKENS))
        assert np.abs(want - np.asarray(model.apply({"params": prepared}, TOKENS))).max() > 1e-3, (
            "it has a part in them"
        )
        x = jax.random.normal(jax.random.key(0), (3, kernel.shape[0]))
        product = np.asarray(x) @ np.asarray(kernel.dequantize())
        np.testing.assert_allclose(matmul(x, laid_out), product, atol=1e-5 * np.abs(product).max())
    assert prepared_nbytes(prepare(qparams)) > prepared_nbytes(plain)


def test_matrices_with_zero_points_of_a_dtype_are_one_product():
    spec = lq.QuantSpec(bits=4, zero_dtype="float16")
    names = ("q_proj", "k_proj", "v_proj")
    model, qparams = packed(specs={f"block_0/attention/{name}": spec for name in names})
    prepared = prepare(qparams)
    assert "q_proj+k_proj+v_proj" in prepared["block_0"]["attention"]
    assert_same_logits(model, prepared, qparams)


def test_dense_parameters_are_left_alone():
    params = random_params(llama_config())
    assert jax.tree.structure(prepare(params)) == jax.tree.structure(params)
    assert prepared_nbytes(params) == 0


def test_the_bytes_of_what_was_laid_out_are_known():
    _, qparams = packed()
    blocks = {name: leaf for name, leaf in prepare(qparams).items() if name.startswith("block")}
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(blocks) if leaf.ndim > 1)
    assert prepared_nbytes(blocks) == arrays


def test_greedy_tokens_are_the_same():
    model, qparams = packed(8)
    options = {"max_new_tokens": 12, "stop_ids": ()}
    assert generate(model, prepare(qparams), [[1, 2, 3]], **options) == generate(model, qparams, [[1, 2, 3]], **options)
