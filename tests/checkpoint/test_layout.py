"""The tensors of a shard: named and shaped as announced, as large as counted, and the same leaves when read back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from random_qtensors import random_qtensor

from lq.checkpoint.layout import expected_tensors, from_tensors, leaf_bytes, to_tensors
from lq.numerics.spec import QuantSpec

SPECS = [
    QuantSpec(bits=3, group_size=32),
    QuantSpec(bits=4, group_size=64, symmetric=True, rank=4),
    QuantSpec(bits=3, group_size=32, zero_dtype="bfloat16"),
    QuantSpec(bits=7, group_size=None, zero_dtype="float16", scale_dtype="float32", rank=1),
    QuantSpec(bits=2, group_size=128, scale_dtype="float16", zero_dtype="float32", rank=500),
]
SHAPES = [(96, 40), (33, 7), (2, 96, 24)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_leaf_comes_back_from_its_tensors(spec, shape, tmp_path):
    packed, dense = random_qtensor(spec, shape)[0], jnp.arange(5, dtype=jnp.bfloat16)
    params, path = {"mlp": {"up_proj": {"kernel": packed}}, "norm": {"scale": dense}}, "mlp/up_proj/kernel"
    specs = {path: (spec, shape)}
    tensors = to_tensors(params)
    expected = expected_tensors({"norm/scale": (5,)}, specs)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert sum(tensor.nbytes for tensor in tensors.values()) == spec.size_bits(shape) // 8 + dense.nbytes

    safetensors.numpy.save_file(tensors, tmp_path / "shard.safetensors")
    assert leaf_bytes(tmp_path / "shard.safetensors") == {path: packed.nbytes, "norm/scale": dense.nbytes}
    read = from_tensors(safetensors.numpy.load_file(tmp_path / "shard.safetensors"), specs, None)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_names_of_a_leaf_with_everything():
    spec = QuantSpec(bits=3, group_size=32, zero_dtype="bfloat16", rank=4)
    names = expected_tensors({}, {"q/kernel": (spec, (96, 40))})
    assert names == {
        "q/kernel:codes": (6 + 3, 40),  # 96 codes: a plane of 2 bits, 16 to a word, and one of 1 bit
        "q/kernel:scales": (3, 40),
        "q/kernel:zeros": (3, 40),
        "q/kernel:left:codes": (24, 4),
        "q/kernel:left:scales": (1, 4),
        "q/kernel:right:codes": (1, 40),
        "q/kernel:right:scales": (1, 40),
    }
