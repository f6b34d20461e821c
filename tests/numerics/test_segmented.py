"""A matrix of several widths: what it stands for, what it costs, how it is stored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.checkpoint.layout import expected_tensors, from_tensors, to_tensors
from lq.errors import UserError
from lq.models.prepared import prepare
from lq.numerics.matmul import lookup, matmul
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import SegmentedQTensor, runs_of
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_leaf
from lq.quantizers.recipe import Recipe

pytestmark = pytest.mark.once

SHAPE = (512, 96)


def mixed(bits=3, group_size=64, symmetric=False, widths=(4, 4, 3, 1), seed=0):
    """A tensor, and the weight that it stands for, float64."""
    rng = np.random.default_rng(seed)
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric, mixed=True)
    of_channel = np.repeat(widths, 128)
    of_group = np.repeat(widths, 128 // group_size)
    codes = rng.integers(0, 2 ** of_channel[:, None], SHAPE)
    scales = np.asarray(jnp.asarray(rng.uniform(0.5, 2, (of_group.size, SHAPE[1])), jnp.bfloat16), np.float64)
    zeros = rng.integers(0, 2 ** of_group[:, None], scales.shape)
    middle = np.where(of_group == 1, 0.5, 2.0 ** (of_group - 1))[:, None] + np.zeros_like(scales)
    permutation = rng.permutation(SHAPE[0])
    weight = np.empty(SHAPE)
    expand = lambda a: np.repeat(a, group_size, axis=0)  # noqa: E731
    weight[permutation] = (codes - expand(middle if symmetric else zeros)) * expand(scales)
    arrays = [jnp.asarray(a) for a in (codes, scales, zeros, permutation)]
    if symmetric:
        arrays[2] = None
    codes, scales, zeros, permutation = arrays
    segments = []
    for width, first, stop in runs_of(widths):
        groups = slice(first // group_size, stop // group_size)
        segments.append((width, codes[first:stop], scales[groups], None if symmetric else zeros[groups]))
    return SegmentedQTensor.from_segments(permutation, segments, spec, SHAPE), weight


def planned(widths=(4, 2, 2, 1), group_size=32, symmetric=False, shape=(256, 96), seed=0):
    """A tensor whose spec gives the widths, or groups by energy of one; and the weight that it stands for, float64."""
    rng = np.random.default_rng(seed)
    order = {"widths": widths} if len(widths) > 1 else {"by_energy": True}
    spec = QuantSpec(bits=max(widths), group_size=group_size, symmetric=symmetric, **order)
    length = shape[0] // len(widths)
    group = rng.permutation(np.repeat(np.arange(shape[0] // group_size), group_size))
    permutation = np.argsort(group, kind="stable")
    weight, segments = np.empty(shape), []
    for i, bits in enumerate(widths):
        codes = rng.integers(0, 2**bits, (length, shape[1]))
        groups = (length // group_size, shape[1])
        scales = np.asarray(jnp.asarray(rng.uniform(0.5, 2, groups), jnp.bfloat16), np.float64)
        zeros = (
            np.full(groups, 0.5 if bits == 1 else 2.0 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, groups)
        )
        expand = lambda a: np.repeat(a, group_size, axis=0)  # noqa: E731
        rows = np.arange(i * length, (i + 1) * length)
        weight[permutation[rows]] = (codes - expand(zeros)) * expand(scales)
        if segments and segments[-1][0] == bits:
            _, *before = segments.pop()
            codes, scales, zeros = (np.concatenate(pair) for pair in zip(before, (codes, scales, zeros), strict=True))
        segments.append((bits, codes, scales, zeros))
    given = [(b, jnp.asarray(c), jnp.asarray(s), None if symmetric else jnp.asarray(z)) for b, c, s, z in segments]
    return SegmentedQTensor.from_segments(jnp.asarray(permutation), given, spec, shape), weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("widths", "group_size", "shape"),
    [
        ((4, 2, 2, 1), 32, (256, 96)),
        ((3, 5), 64, (256, 96)),
        ((8, 8, 1, 2), 64, (256, 96)),
        ((2, 1), 32, (8320, 32)),
        ((3,), 32, (96, 64)),
    ],
)
def test_widths_that_a_plan_gives(symmetric, widths, group_size, shape):
    """What it stands for and costs, products, a shard and back."""
    tensor, weight = planned(widths, group_size, symmetric, shape)
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()), weight)
    assert tensor.widths == widths
    assert tensor.spec.code_bits == sum(widths) / len(widths)
    stored = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tensor))
    assert tensor.nbytes == stored == tensor.spec.size_bits(tensor.shape) // 8
    K, N = shape
    part = K // len(widths), N
    of_parts = [QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric).size_bits(part) for bits in widths]
    of_channel = 8 if K // group_size <= 256 else 16
    assert 8 * stored == sum(of_parts) + of_channel * K, "each channel says in which group it is"

    x = np.random.default_rng(1).standard_normal((5, K)).astype(np.float32)
    bound = K * 2.0**-24 * (np.abs(x) @ np.abs(weight))
    assert (np.abs(np.asarray(matmul(jnp.asarray(x), tensor)) - x.astype(np.float64) @ weight) <= bound).all()

    tensors, specs = to_tensors({"up_proj": {"kernel": tensor}}), {"up_proj/kernel": (tensor.spec, tensor.shape)}
    assert {name: array.shape for name, array in tensors.items()} == expected_tensors({}, specs)
    assert sum(array.nbytes for array in tensors.values()) == tensor.nbytes
    again = from_tensors(tensors, specs, None)["up_proj"]["kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(tensor)
    np.testing.assert_array_equal(np.asarray(again.dequantize()), weight)
    assert QuantSpec.from_dict(json.loads(json.dumps(tensor.spec.to_dict()))) == tensor.spec


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"bits": 4, "widths": (4,)}, "write 2 to 256 widths"),
        ({"bits": 4, "widths": (3, 2)}, "bits the largest of them"),
        ({"bits": 9, "widths": (9, 2)}, "bits: 9"),
        ({"bits": 4, "widths": [4, 2]}, r"widths: \[4, 2\]; write whole numbers"),
        ({"bits": 4, "widths": (4, 2), "rank": 4}, "do not go with rank"),
        ({"bits": 4, "widths": (4, 2), "zero_dtype": "bfloat16"}, "do not go with zero_dtype"),
        ({"bits": 4, "widths": (4, 2), "mixed": True}, "do not go with mixed"),
        ({"bits": 4, "widths": (4, 2), "group_size": None}, "widths: a column is one group"),
        ({"bits": 4, "widths": (4, 2), "by_energy": True}, "leave out by_energy"),
        ({"bits": 4, "by_energy": True, "group_size": None}, "by_energy: a column is one group"),
        (
            {"bits": 4, "by_energy": True, "rank": 2},
            "by_energy: groups of channels by their energy do not go",
        ),
        ({"bits": 4, "by_energy": 1}, "by_energy: 1; write true or false"),
    ],
)
def test_widths_that_cannot_be(given, line):
    with pytest.raises(UserError, match=line):
        QuantSpec(**given)


@pytest.mark.parametrize("shape", [(32, 64), (80, 64), (2, 64, 64)])
def test_a_matrix_without_several_whole_groups_keeps_neighbours(shape):
    spec = QuantSpec(bits=4, group_size=32, by_energy=True)
    assert not spec.orders(shape)
    assert spec.size_bits(shape) == QuantSpec(bits=4, group_size=32).size_bits(shape)
    weight = jnp.ones(shape)
    tensor = quantize_leaf(weight, None, None, spec, Recipe())
    assert isinstance(tensor, QTensor)
    assert tensor.nbytes == spec.size_bits(shape) // 8


def test_a_matrix_without_such_segments():
    with pytest.raises(UserError, match=r"a matrix \[192, 64\] has no 2 segments of whole groups of 128"):
        QuantSpec(bits=4, widths=(4, 2)).size_bits((192, 64))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "widths"), [(3, (4, 4, 3, 1)), (2, (2, 3, 1, 2)), (5, (8, 4, 4, 4))])
def test_it_stands_for_the_weight_and_costs_what_is_counted(symmetric, group_size, bits, widths):
    tensor, weight = mixed(bits, group_size, symmetric, widths)
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()), weight)  # bfloat16 times small integers is exact
    assert tensor.widths == widths
    stored = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(tensor))
    assert tensor.nbytes == stored + 4 == tensor.spec.size_bits(SHAPE) // 8
    plain = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    assert tensor.spec.size_bits(SHAPE) == plain.size_bits(SHAPE) + 16 * 512 + 8 * 4


def test_products_and_lookups():
    tensor, weight = mixed()
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    expected = x.astype(np.float64) @ weight
    bound = 512 * 2.0**-24 * (np.abs(x) @ np.abs(weight))
    assert (np.abs(np.asarray(matmul(jnp.asarray(x), tensor)) - expected) <= bound).all()
    laid_out = prepare({"block_0": {"up_proj": {"kernel": tensor}}})["block_0"]["up_proj"]["kernel"]
    assert (np.abs(np.asarray(matmul(jnp.asarray(x), laid_out)) - expected) <= bound).all()
    rows = jnp.asarray([3, 95, 0])
    np.testing.assert_array_equal(np.asarray(lookup(tensor, rows)), weight.T[np.asarray(rows)])


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_comes_back_from_a_shard(symmetric):
    tensor, weight = mixed(symmetric=symmetric)
    tensors = to_tensors({"mlp": {"up_proj": {"kernel": tensor}}})
    specs = {"mlp/up_proj/kernel": (tensor.spec, SHAPE)}
    assert {name: array.shape for name, array in tensors.items()} == expected_tensors({}, specs)
    assert sum(array.nbytes for array in tensors.values()) == tensor.nbytes
    again = from_tensors(tensors, specs, None)["mlp"]["up_proj"]["kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(tensor)
    np.testing.assert_array_equal(np.asarray(again.dequantize()), weight)
    tensors["mlp/up_proj/kernel:widths"] = np.asarray([4, 4, 4, 4], np.uint8)
    with pytest.raises(ValueError, match="are not those of the spec"):
        from_tensors(tensors, specs, None)


def test_neighbours_of_equal_width_are_one_segment():
    assert runs_of((4, 4, 3, 1)) == [(4, 0, 256), (3, 256, 384), (1, 384, 512)]
    assert len(mixed()[0].segments) == 3


@pytest.mark.parametrize("shape", [(128, 64), (320, 64), (256, 48), (2, 256, 64)], ids=str)
def test_what_cannot_be_cut_is_not_mixed(shape):
    spec = QuantSpec(bits=3, group_size=64, mixed=True)
    assert not spec.mixes(shape)
    assert spec.size_bits(shape) == QuantSpec(bits=3, group_size=64).size_bits(shape)


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="mixed: runs of 128 channels hold no whole group; write group_size 32, 64 or"):
        QuantSpec(bits=3, group_size=256, mixed=True)
    with pytest.raises(UserError, match="do not go with rank; leave one out"):
        QuantSpec(bits=3, rank=4, mixed=True)
