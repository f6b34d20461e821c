"""`QTensor` and `QuantSpec`: what a code means, and what it costs."""

import json
import math
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_qtensors import dequantize_by_definition, random_qtensor

from lq.errors import UserError
from lq.numerics.matmul import lookup, matmul
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec

pytestmark = pytest.mark.once

SHAPES = [(128, 24), (100, 7), (33, 40), (2, 96, 24)]
SPECS = [
    QuantSpec(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)
    for bits in range(1, 9)
    for group, symmetric, dtype in [(32, False, "bfloat16"), (64, True, "float16"), (None, False, "float32")]
]
SPECS += [
    QuantSpec(bits=bits, group_size=group, zero_dtype=zero_dtype)
    for bits, group, zero_dtype in [(1, 32, "float32"), (3, 64, "bfloat16"), (4, None, "float16"), (8, 32, "bfloat16")]
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_zeros_and_values_come_back(spec, shape):
    tensor, (codes, scales, zeros) = random_qtensor(spec, shape)
    np.testing.assert_array_equal(np.asarray(tensor.codes()), codes)
    if zeros is not None:
        np.testing.assert_array_equal(np.asarray(tensor.zero_points()), zeros)
    # A code difference of at most 9 bits times a scale of at most 24 bits: one float32 rounding, none for 16-bit
    # scales. Of a zero point that is no code the difference is rounded too.
    got, roundings = np.asarray(tensor.dequantize(), np.float64), 1 if spec.zero_dtype is None else 2.001
    want = dequantize_by_definition(codes, scales, zeros, spec)
    np.testing.assert_allclose(got, want, rtol=roundings * 2.0**-24, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accounting_equals_the_bytes_on_the_device(spec, shape):
    tensor, _ = random_qtensor(spec, shape)
    measured = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tensor))
    assert measured == tensor.nbytes == spec.size_bits(shape) // 8
    assert tensor.bits_per_weight == spec.bits_per_weight(shape) == 8 * measured / math.prod(shape)


def test_size_in_closed_form():
    # 4-bit codes, one 16-bit scale and one 4-bit zero per group of 128: 4 + 20/128.
    assert QuantSpec(bits=4, group_size=128).bits_per_weight((256, 512)) == 4 + 20 / 128
    assert QuantSpec(bits=3, group_size=64, symmetric=True).bits_per_weight((256, 512)) == 3.25
    assert QuantSpec(bits=2, group_size=None, symmetric=True, scale_dtype="float32").bits_per_weight((256, 8)) == 2.125
    # 16-bit scales and 16-bit zero points per group of 64: 32/64.
    assert QuantSpec(bits=4, group_size=64, zero_dtype="bfloat16").bits_per_weight((256, 512)) == 4.5


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from([32, 64, 128, 256, None]),
    st.sampled_from([{}, {"symmetric": True}, {"zero_dtype": "float16"}, {"zero_dtype": "float32"}]),
    st.sampled_from([0, 1, 5, 64]),
)
def test_accounting_for_any_shape(bits, K, N, group, fields, rank):
    spec = QuantSpec(bits=bits, group_size=group, rank=rank, **fields)
    tensor, _ = random_qtensor(spec, (K, N))
    assert tensor.nbytes * 8 == spec.size_bits((K, N))


def test_goes_through_jit_tree_map_and_eval_shape():
    spec = QuantSpec(bits=3)
    tensor, _ = random_qtensor(spec, (256, 16))
    doubled = jax.jit(lambda t: t.replace(scales=2 * t.scales))(tensor)
    np.testing.assert_array_equal(np.asarray(doubled.dequantize()), 2 * np.asarray(tensor.dequantize()))
    abstract = jax.eval_shape(lambda t: t, tensor)
    assert abstract.shape == (256, 16)
    assert abstract.nbytes == tensor.nbytes
    assert jax.tree.structure(jax.tree.map(lambda a: a, tensor)) == jax.tree.structure(tensor)


def test_one_compilation_serves_equal_specs():
    traces = []

    @jax.jit
    def product(x, w):
        traces.append(None)
        return matmul(x, w)

    for seed in range(3):
        product(jnp.ones((2, 128)), random_qtensor(QuantSpec(bits=4), (128, 8), seed)[0])
    assert len(traces) == 1


@pytest.mark.parametrize("zero_dtype", [None, "bfloat16", "float16", "float32"])
def test_matmul_equals_the_dequantized_product(zero_dtype):
    tensor, parts = random_qtensor(QuantSpec(bits=5, group_size=32, zero_dtype=zero_dtype), (96, 24))
    x = np.random.default_rng(3).standard_normal((4, 96)).astype(np.float32)
    dense = dequantize_by_definition(*parts, tensor.spec)
    bound = 98 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(dense))
    assert (np.abs(np.asarray(matmul(x, tensor), np.float64) - x.astype(np.float64) @ dense) <= bound).all()


@pytest.mark.parametrize("fields", [{}, {"symmetric": True}, {"zero_dtype": "bfloat16"}], ids=str)
def test_lookup_in_a_packed_table_gives_its_columns(fields):
    tensor, _ = random_qtensor(QuantSpec(bits=3, group_size=32, **fields), (96, 50))
    rows = jnp.asarray([[3, 49], [0, 3]])
    np.testing.assert_array_equal(np.asarray(lookup(tensor, rows)), np.asarray(tensor.dequantize()).T[np.asarray(rows)])


def test_zero_points_must_fit_the_spec():
    codes, scales = jnp.zeros((32, 4), jnp.uint32), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="needs zero points"):
        QTensor.from_codes(codes, scales, None, QuantSpec(bits=4))
    with pytest.raises(ValueError, match="has no zero points"):
        QTensor.from_codes(codes, scales, jnp.zeros((1, 4), jnp.uint32), QuantSpec(bits=4, symmetric=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "bits: 9 is not a width lq can store; write a whole number from 1 to 8"),
        ({"bits": 2.5}, "bits: 2.5 is not a width"),
        ({"bits": 3.0}, "bits: 3.0 is not a width"),
        ({"bits": True}, "bits: True is not a width"),
        ({"bits": 4, "group_size": 64.0}, "group_size: 64.0; write one of"),
        ({"bits": 4, "symmetric": "no"}, "symmetric: 'no'; write true or false"),
        ({"bits": 4, "scale_dtype": ["bfloat16"]}, "scale_dtype: .* write one of"),
        (
            {"bits": 4, "group_size": 100},
            "group_size: 100; write one of 32, 64, 128, 256, or null for the whole column",
        ),
        ({"bits": 4, "scale_dtype": "int8"}, "scale_dtype: 'int8'; write one of bfloat16, float16, float32"),
        ({"bits": 4, "zero_dtype": "int8"}, "zero_dtype: 'int8'; write one of .*, or null for codes"),
        ({"bits": 4, "zero_dtype": ["float16"]}, "zero_dtype: .*; write one of"),
        ({"bits": 4, "zero_dtype": "float16", "symmetric": True}, "zero_dtype: float16, but symmetric codes store no"),
        ({"bits": 4, "rank": -1}, "rank: -1; write a whole number, 0 for no low-rank residual"),
        ({"bits": 4, "rank": 2.0}, "rank: 2.0; write a whole number"),
    ],
)
def test_a_spec_that_cannot_be_stored_says_what_to_write(fields, message):
    with pytest.raises(UserError, match=message):
        QuantSpec(**fields)


def test_spec_survives_json():
    for fields in ({"symmetric": True, "scale_dtype": "float32"}, {"zero_dtype": "bfloat16", "rank": 8}):
        spec = QuantSpec(bits=3, group_size=None, **fields)
        assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.from_dict({"bits": 3, "group_size": 64}) == QuantSpec(bits=3, group_size=64), (
        "fields may be missing"
    )
    with pytest.raises(UserError, match="unknown field 'width'"):
        QuantSpec.from_dict({"width": 3})


def test_goes_through_orbax(tmp_path):
    import orbax.checkpoint as ocp

    params = {
        "up_proj": {"kernel": random_qtensor(QuantSpec(bits=3), (256, 64))[0]},
        "scale": jnp.ones(8, jnp.bfloat16),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c", jax.eval_shape(lambda: params))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_sharded_over_outputs_it_gives_the_same_product():
    """On two devices, in a process of its own: the number of CPU devices is fixed when JAX starts."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from lq.numerics.matmul import matmul
        from lq.numerics.spec import QuantSpec
        from lq.quantizers import QUANTIZERS, quantize_matrix

        weight = jax.random.normal(jax.random.key(0), (96, 128))
        tensor = quantize_matrix(weight, None, QuantSpec(bits=3, group_size=32), "rtn", QUANTIZERS.options("rtn", {}))
        x = jax.random.normal(jax.random.key(1), (4, 96))
        mesh = Mesh(np.asarray(jax.devices()), ("outputs",))
        sharded = jax.device_put(tensor, NamedSharding(mesh, PartitionSpec(None, "outputs")))
        y = jax.jit(matmul)(x, sharded)
        assert len(sharded.planes[0].sharding.device_set) == 2
        np.testing.assert_allclose(np.asarray(y), np.asarray(jax.jit(matmul)(x, tensor)), rtol=1e-6, atol=1e-5)
    """
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
