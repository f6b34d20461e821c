"""The TPU kernels interpreted on the CPU, against float64 NumPy; what they cost on a TPU is in test_tpu_compile.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq_kernels import PackedMatrix, SegmentedMatrix, quantized_matmul
from lq_kernels.backend import Problem, segment_of
from lq_kernels.prepared import lay_out
from lq_kernels.tpu import BACKEND, TpuConfig, digits, quantize_rows
from lq_kernels.tpu.fields import scheme
from lq_kernels.tpu.layout import target_of

pytestmark = pytest.mark.once

BOUND = 4e-6  # of |x| @ |w|: what the exact products, summed in float32, may be off by
ROUNDED = 2.0**-9 + BOUND  # the same where every weight is rounded to bfloat16 before
COLUMN = None  # group size: one scale per output channel
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def pack_by_hand(codes, bits):
    """Field i of word r is the code of channel r * 32 / width + i."""
    planes, low = [], 0
    for width in PLANES[bits]:
        per_word = 32 // width
        plane = np.zeros((-(-codes.shape[0] // per_word), codes.shape[1]), np.uint32)
        for k, row in enumerate(codes):
            field = (row >> low & (1 << width) - 1).astype(np.uint32)
            plane[k // per_word] |= field << np.uint32(width * (k % per_word))
        planes.append(jnp.asarray(plane))
        low += width
    return tuple(planes)


def matrix(bits, K, N, group, asymmetric=False, seed=0, codes=None, scale_dtype="float32", zeros=None):
    """A packed matrix and the float64 array it stands for."""
    rng = np.random.default_rng(seed)
    group = group or K
    groups = -(-K // group)
    codes = rng.integers(0, 1 << bits, (K, N)) if codes is None else codes
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (groups, N)) / (1 << bits), scale_dtype)
    if zeros is None and asymmetric:
        zeros = rng.integers(0, 1 << bits, (groups, N)).astype(np.uint8)
    zero_point = (1 << bits) / 2
    packed = PackedMatrix(
        planes=pack_by_hand(codes, bits),
        scales=scales,
        zeros=None if zeros is None else jnp.asarray(zeros),
        zero_point=zero_point,
        bits=bits,
        group_size=group,
        in_features=K,
    )
    of = np.arange(K) // group
    zero = zero_point if zeros is None else np.asarray(zeros, np.float64)[of]
    return packed, (codes - zero) * np.asarray(scales.astype("float32"), np.float64)[of]


def activations(M, K, dtype="bfloat16", seed=1, mean=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1, (M, K)), dtype)


def product(x, w, target, out_dtype="float32", **fields):
    prepared = lay_out(w, BACKEND, target)
    segments = tuple(segment_of(s) for s in w.segments)
    problem = Problem(x.shape[0], x.shape[1], w.out_features, str(x.dtype), out_dtype, segments, None)
    # Interpreted, every unrolled chunk is compiled anew; loops are tested by themselves.
    config = dataclasses.replace(BACKEND.default_config(problem, target), **{"unroll": 1, **fields})
    y = BACKEND.matmul(x, prepared, out_dtype=jnp.dtype(out_dtype), config=config, interpret=True)
    assert y.shape == (x.shape[0], w.out_features)
    assert y.dtype == jnp.dtype(out_dtype)
    return np.asarray(y.astype(jnp.float32), np.float64)


def error(y, x, dense):
    """The largest error relative to |x| @ |w|."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    return np.max(np.abs(y - x @ dense) / (np.abs(x) @ np.abs(dense)))


LAYOUTS = [(bits, target) for target in ("v5e", "v6e") for bits in range(1, 9)] + [(8, "v4"), (3, "v6e-speed")]


@pytest.mark.parametrize(("bits", "target"), LAYOUTS)
def test_every_width_of_every_layout(bits, target):
    w, dense = matrix(bits, 512, 256, 128, asymmetric=True, seed=bits)
    x = activations(3, 512)
    for kind in {"bfloat16", "bfloat16" if target == "v4" else "digits"}:
        assert error(product(x, w, target, activations=kind), x, dense) < BOUND


CASES = [  # bits, K, N, group, asymmetric, M
    (4, 256, 128, 32, False, 1),
    (3, 512, 100, 64, True, 2),
    (3, 1000, 130, 128, False, 7),
    (2, 1000, 130, 64, True, 9),
    (5, 96, 64, 128, False, 17),
    (8, 768, 128, 256, True, 33),
    (6, 300, 128, COLUMN, True, 8),
    (7, 1024, 128, 512, False, 16),
    (1, 97, 1, 32, True, 5),
    (4, 1, 3, COLUMN, False, 2),
]


@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize(("bits", "K", "N", "group", "asymmetric", "M"), CASES)
def test_ragged_shapes_and_groups(bits, K, N, group, asymmetric, M, target):
    w, dense = matrix(bits, K, N, group, asymmetric, seed=K + N)
    x = activations(M, K)
    assert error(product(x, w, target), x, dense) < BOUND


@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("M", [1, 5])
def test_small_groups_that_share_a_dot_keep_their_own_rows(M, target):
    w, dense = matrix(4, 512, 128, 32, asymmetric=True)
    x = activations(M, 512)
    assert error(product(x, w, target, depth=128), x, dense) < BOUND


@pytest.mark.parametrize("target", ["v4", "v6e"])
def test_segments_of_different_widths_in_one_kernel(target):
    shapes = [(2, 128, 64), (3, 384, 128), (4, 256, 32), (8, 77, 128)]
    parts = [matrix(b, K, 200, g, asymmetric=b == 3, seed=b) for b, K, g in shapes]
    w = SegmentedMatrix(segments=tuple(p for p, _ in parts))
    dense = np.concatenate([d for _, d in parts])
    x = activations(4, dense.shape[0])
    assert error(product(x, w, target), x, dense) < BOUND


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("target", ["v4", "v5e", "v6e"])
def test_blocks_of_rows_ragged_and_sharing_an_unpacked_strip(target, keep):
    w, dense = matrix(8, 512, 256, 128, asymmetric=True)
    x = activations(45, 512)
    y = product(x, w, target, rows=16, columns=128, unroll=1, keep=keep)
    assert error(y, x, dense) < BOUND


SCALED_CASES = [  # bits, group, asymmetric, dtype of scales, zeros, zero point that is no whole number
    (4, 128, False, "bfloat16", None),
    (3, 64, True, "bfloat16", None),
    (8, 32, True, "bfloat16", None),
    (2, 128, True, "float32", None),
    (1, 128, False, "float16", None),
    (4, 128, True, "bfloat16", 7.3),
    (4, 256, True, "bfloat16", None),
]


@pytest.mark.parametrize(("bits", "group", "asymmetric", "scale_dtype", "zero"), SCALED_CASES)
def test_scaled_weights_are_rounded_once_each(bits, group, asymmetric, scale_dtype, zero):
    zeros = None if zero is None else np.full((-(-700 // group), 384), zero, np.float32)
    w, dense = matrix(bits, 700, 384, group, asymmetric, scale_dtype=scale_dtype, zeros=zeros)
    x = activations(20, 700)
    y = product(x, w, "v6e", scaled=True)
    assert error(y, x, dense) < (ROUNDED if group < 256 else BOUND)
    if group < 256:
        rounded = np.asarray(jnp.asarray(dense, "float32").astype("bfloat16").astype("float32"), np.float64)
        assert error(y, x, rounded) < BOUND  # to the nearest, from the exact weight


@pytest.mark.long
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("rows", "turn"), [(80, 80), (96, 32), (32, 16), (48, 48)])
def test_tiles_and_turns_of_rows_share_an_unpacked_strip(rows, turn, scaled, monkeypatch):
    """Blocks, turns in them, tiles of registers in those (here smaller than on a TPU), ragged, over two segments."""
    monkeypatch.setattr("lq_kernels.tpu.tile", lambda *_: (16, 128))
    parts = [matrix(3, 600, 256, 128, asymmetric=True, scale_dtype="bfloat16"), matrix(4, 256, 256, 32, seed=3)]
    dense = np.concatenate([d for _, d in parts])
    x = activations(90, 856)
    w = SegmentedMatrix(segments=tuple(p for p, _ in parts))
    y = product(x, w, "v6e", rows=rows, turn=turn, columns=256, unroll=2, keep=True, scaled=scaled)
    assert error(y, x, dense) < (ROUNDED if scaled else BOUND)


def test_scaled_is_the_default_of_many_bfloat16_rows_on_deep_matrix_units_alone():
    w, _ = matrix(4, 512, 256, 128)
    problem = Problem(256, 512, 256, "bfloat16", "bfloat16", (segment_of(w),), None)

    def scaled(target="v6e", **changes):
        return BACKEND.default_config(dataclasses.replace(problem, **changes), target).scaled

    assert scaled()
    assert scaled("v7x")
    assert not any(scaled(target) for target in ("v4", "v5e", "v5p", "tpu"))
    assert not scaled(rows=255)
    assert not scaled(x_dtype="float32")
    assert not scaled(out_dtype="float32")
    assert not scaled(segments=(dataclasses.replace(problem.segments[0], group_size=256),))


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_loops_with_and_without_chunks_left_over(unroll):
    w, dense = matrix(3, 256 * 5, 128, 128)
    x = activations(2, 256 * 5)
    assert error(product(x, w, "v5e", unroll=unroll), x, dense) < BOUND


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_wider_activations_lose_nothing(dtype, target):
    w, dense = matrix(4, 512, 128, 128)
    x = activations(3, 512, dtype)
    assert error(product(x, w, target), x, dense) < BOUND


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_bfloat16_out_is_rounded_once(target):
    w, dense = matrix(4, 512, 128, 128)
    x = activations(3, 512)
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    slack = BOUND * np.abs(np.asarray(x.astype(jnp.float32), np.float64)) @ np.abs(dense)
    assert np.all(np.abs(product(x, w, target, "bfloat16") - exact) <= 2.0**-8 * np.abs(exact) + slack)


@pytest.mark.parametrize(("bits", "target"), [(1, "v5e"), (7, "v5e"), (8, "v4"), (3, "v6e"), (8, "v6e")])
def test_extreme_codes_and_a_mean_that_cancels(bits, target):
    """All codes 0 or all at the top, x far from zero: where removing the offset of 2**bits costs the most."""
    top = (1 << bits) - 1
    codes = np.full((256, 128), top)
    codes[:, ::2] = 0
    w, dense = matrix(bits, 256, 128, 128, codes=codes, zeros=np.full((2, 128), top / 2, np.float32))
    x = activations(4, 256, mean=100.0)
    assert error(product(x, w, target), x, dense) < BOUND


@pytest.mark.long
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("target", ["v4", "v5e", "v6e"])
def test_codes_next_to_their_zeros_cost_what_the_offset_predicts(bits, target):
    """The worst of subtracting the offset afterwards: nearly every code is its zero point, and x has a mean.

    The dot then adds up numbers of |code + offset| <= 2 * 2**bits that cancel against the product of the sums of x.
    Every float32 sum of n terms is off by n * 2**-24 of the sum of their sizes at most, here a group's 128 and the
    scaled sums of 8 groups, once in the dot and once in the correction (whose three bfloat16 terms keep 2**-24).
    """
    K, group = 1024, 128
    zero = (1 << bits) - 1
    codes = np.full((K, 128), zero)
    codes[::97] = 0
    w, dense = matrix(bits, K, 128, group, codes=codes, zeros=np.full((K // group, 128), zero, np.uint8))
    x = activations(4, K, mean=10.0)
    size = np.abs(np.asarray(x.astype(jnp.float32), np.float64))
    scales = np.repeat(np.asarray(w.scales, np.float64), group, axis=0)
    bound = 2 * (group + K // group + 3) * 2.0**-24 * size @ (2 * (1 << bits) * scales)
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ dense
    off = np.abs(product(x, w, target) - exact)
    assert np.all(off <= bound)
    assert np.all(off <= BOUND * size @ (np.abs(dense) + (1 << bits) * scales))  # as the README says


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_fractional_and_distant_zeros(target):
    zeros = np.random.default_rng(0).uniform(-3, 20, (4, 128)).astype(np.float32)
    w, dense = matrix(4, 512, 128, 128, zeros=zeros)
    x = activations(3, 512)
    assert error(product(x, w, target), x, dense) < BOUND


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_a_bad_row_stays_alone(bad, target):
    w, dense = matrix(3, 300, 130, 32, asymmetric=True)
    x = activations(5, 300)
    y = product(x.at[2, 7].set(bad), w, target, depth=128)
    assert not np.isfinite(y[2]).any()
    rest = np.array([0, 1, 3, 4])
    assert error(y[rest], x[rest], dense) < BOUND


@pytest.mark.long
@pytest.mark.parametrize("target", ["v4", "v5e", "v6e", "v6e-speed"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_restore_is_the_exact_inverse(bits, target):
    w, _ = matrix(bits, 300, 130, 64, asymmetric=bits % 2 == 0, scale_dtype="float16" if bits > 4 else "bfloat16")
    back = BACKEND.restore(lay_out(w, BACKEND, target))[0]
    assert jax.tree.structure(back) == jax.tree.structure(w)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("container", [4, 8, 16])
def test_a_scheme_uses_every_stored_bit_once(container):
    for bits in range(1, min(container, 7) + 1):
        s = scheme(bits, container)
        places = [(p.tile, p.place + i) for code in s.pieces for p in code for i in range(p.width)]
        assert sorted(places) == [(tile, place) for tile in range(bits) for place in range(container)]
        assert all(sorted(p.low + i for p in code for i in range(p.width)) == list(range(bits)) for code in s.pieces)


def test_prepared_matrices_cost_their_bits():
    w, _ = matrix(3, 1024, 256, 128, scale_dtype="bfloat16")
    assert lay_out(w, BACKEND, "v5e").nbytes == 1024 * 256 * 3 // 8 + 8 * 256 * 2
    assert lay_out(w, BACKEND, "v6e-speed").nbytes == 1024 * 256 * 4 // 8 + 8 * 256 * 2


INTEGER_CASES = [("v5e", 2, 128), ("v5e", 3, 64), ("v5e", 4, 128), ("v6e", 3, COLUMN), ("v6e", 4, 128), ("v6e", 8, 32)]


@pytest.mark.parametrize(("target", "bits", "group"), INTEGER_CASES)
def test_int8_activations_are_rounded_once_and_then_exact(target, bits, group):
    w, dense = matrix(bits, 600, 130, group, asymmetric=True)
    x = activations(5, 600)
    rounded, scale = quantize_rows(x)
    y = product(x, w, target, activations="int8")
    exact = np.asarray(rounded, np.float64) * np.asarray(scale, np.float64)
    assert np.max(np.abs(y - exact @ dense) / (np.abs(exact) @ np.abs(dense))) < BOUND
    assert 1e-4 < error(y, x, dense) < 1e-2


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e38])
def test_digits_add_up_to_all_but_the_smallest_numbers(size):
    x = activations(4, 300, "float32") * (size / 8)
    x = x.at[1].set(0).at[2, 5].set(size).at[3, 7].set(np.nan)
    found, places = digits(x)
    assert found.dtype == jnp.int8
    assert int(jnp.max(jnp.abs(found.astype(jnp.int32)))) <= 64
    total = (np.asarray(found, np.float64) * np.asarray(places, np.float64)).reshape(4, 4, 300).sum(0)
    x = np.asarray(x, np.float64)
    assert np.isnan(total[3]).all()
    assert np.all(np.abs(total - x)[:3] <= 2.0**-27 * np.abs(x[:3]).max(1, keepdims=True))
    small = jnp.asarray(x[0], "bfloat16").astype("float32")[None]
    exact = np.abs(small) > 2.0**-20 * float(jnp.max(jnp.abs(small)))
    found, places = digits(small)
    total = (np.asarray(found, np.float64) * np.asarray(places, np.float64)).sum(0)
    assert np.all((total == np.asarray(small[0], np.float64)) | ~np.asarray(exact[0]))


@pytest.mark.parametrize(("target", "bits", "group"), INTEGER_CASES)
def test_digits_of_rows_with_an_outlier_lose_nothing(target, bits, group):
    w, dense = matrix(bits, 600, 130, group, asymmetric=True)
    x = activations(5, 600).at[:, 9].set(3000)
    assert error(product(x, w, target, activations="digits"), x, dense) < BOUND


def test_digits_are_the_default_of_few_bfloat16_rows_where_integers_are_multiplied():
    w, _ = matrix(4, 512, 256, 128)
    problem = Problem(4, 512, 256, "bfloat16", "bfloat16", (segment_of(w),), None)

    def kind(target="v5e", **changes):
        return BACKEND.default_config(dataclasses.replace(problem, **changes), target).activations

    assert {kind(), kind("v5p"), kind("v6e"), kind(out_dtype="float32")} == {"digits"}
    assert {kind("v4"), kind("v7x"), kind(rows=5), kind(x_dtype="float32")} == {"bfloat16"}


def test_int8_activations_are_never_the_default_and_refused_without_the_unit():
    w, _ = matrix(4, 256, 128, 128)
    problem = Problem(16, 256, 128, "bfloat16", "bfloat16", (segment_of(w),), "TPU v5 lite")
    assert BACKEND.default_config(problem, "v5e").activations == "bfloat16"
    assert all(c.activations == "bfloat16" for c in BACKEND.candidates(problem, "v5e"))
    with pytest.raises(NotImplementedError, match="integer matrix unit"):
        product(activations(2, 256), w, "v4", activations="int8")


def test_device_kinds():
    kinds = ["TPU v4", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x", "TPU v3", None]
    assert [target_of(k) for k in kinds] == ["v4", "v5e", "v5e", "v5p", "v5p", "v6e", "v7x", "tpu", "tpu"]


def test_what_is_refused():
    w, _ = matrix(4, 256, 128, 128)
    problem = Problem(16, 256, 128, "bfloat16", "bfloat16", (segment_of(w),), "TPU v4")
    assert BACKEND.refuses(problem) is None
    odd = dataclasses.replace(segment_of(w), group_size=48)
    assert "groups of 48" in BACKEND.refuses(dataclasses.replace(problem, segments=(odd,)))
    long = dataclasses.replace(segment_of(w), in_features=1 << 20)
    assert "VMEM" in BACKEND.refuses(dataclasses.replace(problem, in_features=1 << 20, segments=(long,)))


def test_through_the_public_function():
    w, dense = matrix(4, 256, 128, 128)
    x = activations(6, 256).reshape(2, 3, 256)
    config = TpuConfig(columns=128, unroll=1)
    y = quantized_matmul(x, w, backend="mosaic_tpu", config=config, interpret=True, out_dtype=jnp.float32)
    assert error(np.asarray(y, np.float64).reshape(6, 128), x.reshape(6, 256), dense) < BOUND


@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "v7x", "tpu"])
def test_lowers_for_a_tpu_from_any_machine(target):
    """Block shapes and operations that Pallas refuses show here, on every supported version of JAX."""
    w = SegmentedMatrix(segments=(matrix(3, 256, 128, 32)[0], matrix(8, 200, 128, 128)[0]))
    prepared = lay_out(w, BACKEND, target)
    for M in (1, 300):
        problem = Problem(M, 456, 128, "float32", "bfloat16", prepared.segments, None)
        config = BACKEND.default_config(problem, target)

        def of(x, w, config=config):
            return BACKEND.matmul(x, w, out_dtype=jnp.bfloat16, config=config)

        text = jax.jit(of).trace(activations(M, 456, "float32"), prepared).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 1
