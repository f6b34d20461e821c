"""The C++ backend against float64, on every instruction set that this processor has."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from products import assert_product, numpy_planes, random_matrix, random_rows, random_segments

from lq_kernels import cpu, quantized_matmul
from lq_kernels.cpu import BACKEND, CpuConfig, building, codebook_matmul
from lq_kernels.cpu.call import Operand, call
from lq_kernels.cpu.library import library
from lq_kernels.packed import SegmentedMatrix
from lq_kernels.prepared import lay_out

if building.find() is None and building.compiler() is not None:
    building.build()  # the sources are newer than the installation

needs_library = pytest.mark.skipif(library().reason is not None, reason=cpu.status())
ISAS = library().supported or ("plain",)
TARGETS = ("canonical", "blocked")
INTEGERS_ONLY = ("amx", "avx512_vnni")  # instruction sets that serve no codebook
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64)


def product(x, w, *, isa=None, target="blocked", out_dtype=jnp.float32, threads=1):
    """x @ w by the backend itself; x in the order of w's channels."""
    w = SegmentedMatrix(segments=w.segments, permutation=None)
    config = CpuConfig(isa=isa, threads=threads)
    return BACKEND.matmul(x, lay_out(w, BACKEND, target), out_dtype=out_dtype, config=config, interpret=False)


def equal_bits(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_where_a_compiler_is_found_the_library_is_there():
    assert building.compiler() is None or library().reason is None, cpu.status()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("K", "N", "group"),
    [(256, 384, 32), (512, 100, 64), (1000, 130, 128), (600, 40, 256), (96, 64, 128), (130, 300, 130), (33, 5, 64)],
)
def test_product_equals_float64(isa, bits, K, N, group):
    for asymmetric in (False, True):
        w = random_matrix(bits, K, N, group, asymmetric=asymmetric, seed=bits)
        x = random_rows(ROWS[(bits + K + 6 * asymmetric) % len(ROWS)], K)
        assert_product(product(x, w, isa=isa, target=TARGETS[(bits + asymmetric) % 2]), x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 15, 16, 31, 65, 127, 128, 129, 257])
def test_any_number_of_rows(isa, rows):
    w = random_matrix(4, 256, 260, 128)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = random_rows(rows, 256, dtype)
        assert_product(product(x, w, isa=isa), x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("K", "N", "group"), [(4096, 1000, 128), (11008, 192, 11008)])
def test_layers_of_a_language_model(isa, K, N, group):
    w = random_matrix(4, K, N, group)
    for rows in (1, 20):
        x = random_rows(rows, K, mean=1.0)
        assert_product(product(x, w, isa=isa), x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_types_of_x_and_y(isa, x_dtype, out_dtype):
    w = random_matrix(3, 256, 70, 64)
    for rows in (1, 9):
        x = random_rows(rows, 256, x_dtype)
        y = product(x, w, isa=isa, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        assert_product(y, x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("zero_dtype", [np.uint8, np.int8, np.int32, np.float32, np.float16, ml_dtypes.bfloat16])
def test_types_of_scales_and_zeros(isa, scale_dtype, zero_dtype):
    w = random_matrix(4, 128, 40, 32, scale_dtype=scale_dtype)
    fraction = 0 if np.issubdtype(zero_dtype, np.integer) else 0.375
    zeros = jnp.asarray((np.asarray(w.zeros) + fraction).astype(zero_dtype))
    w = dataclasses.replace(w, zeros=zeros)
    x = random_rows(5, 128)
    assert_product(product(x, w, isa=isa), x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("lengths", "group"), [((128, 256, 128, 128, 100), 128), ((32, 96, 64, 160, 36), 32)])
def test_segments_of_several_widths_in_one_call(isa, permuted, lengths, group):
    w = random_segments((2, 3, 4, 8, 5), lengths, 200, group, permuted=permuted)
    x = random_rows(6, w.in_features)
    for rows, target in itertools.product((1, 6), TARGETS):
        order = slice(None) if w.permutation is None else w.permutation
        assert_product(product(x[:rows, order], w, isa=isa, target=target), x[:rows], w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_codes_zeros_and_scales(isa, bits):
    top = 2**bits - 1
    for codes, zeros, scale in itertools.product((0, top), (0, top), (0.0, 1e-39, 1e30)):
        w = random_matrix(bits, 96, 33, 32, codes=np.int64(codes), zeros=np.int64(zeros), scales=np.float32(scale))
        for rows in (1, 6):
            x = random_rows(rows, 96, mean=100.0)
            y = product(x, w, isa=isa)
            if scale == 1e-39:  # subnormal: XLA's threads take it for zero
                assert np.abs(np.asarray(y)).max() <= 1e-39 * 96 * 110 * top
            elif codes == zeros and codes != 0 and scale:
                # The zero point meets its like through the sum of x: nothing but rounding is left.
                bound = 4e-6 * top * scale * np.abs(np.asarray(x, np.float64)).sum(1, keepdims=True)
                assert (np.abs(np.asarray(y, np.float64)) <= bound).all()
            elif codes == zeros and scale:
                bound = 4e-6 * 2 ** (bits - 1) * scale * np.abs(np.asarray(x, np.float64)).sum(1, keepdims=True)
                assert (np.abs(np.asarray(y, np.float64)) <= bound).all()
            else:
                assert_product(y, x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_at_a_symmetric_zero_point_give_exact_zeros(isa, bits):
    w = random_matrix(bits, 64, 20, 32, asymmetric=False, codes=np.int64(2 ** (bits - 1)))
    w = dataclasses.replace(w, zero_point=float(2 ** (bits - 1)))
    for rows in (1, 6):
        y = np.asarray(product(random_rows(rows, 64, mean=50.0), w, isa=isa))
        # One bit is centred at a half: its zero point of one enters through the sum of x.
        assert np.abs(y).max() <= (1e-3 if bits == 1 else 0.0)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(isa, rows, bad):
    w = random_matrix(3, 100, 60, 32)
    x = np.asarray(random_rows(rows, 100))
    good = product(jnp.asarray(x), w, isa=isa)
    x = x.copy()
    x[1, 99] = bad
    y = np.asarray(product(jnp.asarray(x), w, isa=isa))
    assert not np.isfinite(y[1]).any()
    others = np.arange(rows) != 1
    assert equal_bits(y[others], np.asarray(good)[others])


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_huge_x_at_the_zero_point_hides_nothing(isa, size, bits):
    # The channels of the huge x have a weight of exactly zero, so that |x| @ |w| is that of the others.
    K, huge = 600, [5, 200, 201, 599]
    codes = np.random.default_rng(bits).integers(0, 2**bits, (K, 150))
    codes[huge] = 2 ** (bits - 1)
    w = random_matrix(bits, K, 150, 128, asymmetric=False, codes=codes)
    for rows in (1, 2, 7):
        x = np.array(random_rows(rows, K))
        x[rows // 2, huge] *= size
        assert_product(product(jnp.asarray(x), w, isa=isa), x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("columns", ["one weight each", "none where x is large"])
def test_sparse_columns(isa, x_dtype, columns):
    # avx512_vnni rounds no x by more than 4.1e-6 of itself; the other half of the bound is for the float32 sums.
    codes = np.full((256, 256), 8)
    x = np.array(random_rows(16, 256))
    if columns == "one weight each":
        codes[np.arange(256), np.arange(256)] = 15
    else:
        x[:, ::2] *= 1e-3
        codes[::2] = np.random.default_rng(0).integers(0, 16, (128, 256))
    w, x = random_matrix(4, 256, 256, 128, asymmetric=False, codes=codes), jnp.asarray(x, x_dtype)
    x64, w64 = np.asarray(x.astype(jnp.float32), np.float64), np.asarray(w.dequantize(), np.float64)
    for rows in (1, 16):
        y = np.asarray(product(x[:rows], w, isa=isa), np.float64)
        assert (np.abs(y - x64[:rows] @ w64) <= 8e-6 * np.abs(x64[:rows]) @ np.abs(w64)).all()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_the_greatest_x_near_a_power_of_two(isa):
    """Its highest digit is 127 at most: what would carry beyond takes a unit twice as large."""
    w = random_matrix(4, 256, 64, 128, asymmetric=False)
    x = np.array(random_rows(64, 256))
    x *= 0.9 / np.abs(x).max(axis=1, keepdims=True)
    significands = np.r_[0x7EFE00:0x7F0100, 0x7FFFFF].astype(np.uint32)
    greatest = (significands | np.uint32(0x3F800000)).view(np.float32)
    for first in range(0, len(greatest), 64):
        some = greatest[first : first + 64]
        x[: len(some), 5] = some
        assert_product(product(jnp.asarray(x), w, isa=isa), x, w)
        assert_product(product(jnp.asarray(-x), w, isa=isa), -x, w)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-33, 1e-30, 1e-10, 1e10, 1e30])
def test_small_and_large_x(isa, size):
    w = random_matrix(3, 300, 70, 64)
    dense = np.abs(np.asarray(w.dequantize(), np.float64))
    for rows in (1, 6):
        x = np.array(random_rows(rows, 300) * size)
        x[rows // 2, :128] = 0
        y, x64 = np.asarray(product(jnp.asarray(x), w, isa=isa), np.float64), x.astype(np.float64)
        # The zero point leaves after the sum, so errors are relative to the codes too: at most 7 times 0.03. What is
        # below 2^-126, in x or in a part of it, may be taken for zero.
        bound = 4e-6 * np.abs(x64) @ (dense + 0.21) + 2.0**-126 * (dense + 0.21).sum(0)
        assert (np.abs(y - x64 @ np.asarray(w.dequantize(), np.float64)) <= bound).all()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_of_zeros_gives_zeros(isa):
    w = random_matrix(4, 300, 70, 64)
    for rows in (1, 6):
        x = np.array(random_rows(rows, 300))
        x[rows - 1] = 0
        assert not np.asarray(product(jnp.asarray(x), w, isa=isa))[rows - 1].any()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_of_small_integers_are_exact(isa, bits):
    # Sums below 300 * 8 * 255 < 2^24, and below 2^24 halves at one bit.
    w = random_matrix(bits, 300, 70, 64, scales=np.float32(1))
    rng = np.random.default_rng(bits)
    for rows in (1, 6):
        x = rng.integers(-8, 9, (rows, 300)).astype(np.float32)
        want = x.astype(np.float64) @ np.asarray(w.dequantize(), np.float64)
        for dtype in (jnp.float32, jnp.bfloat16):
            np.testing.assert_array_equal(product(jnp.asarray(x, dtype), w, isa=isa), want)


@needs_library
@pytest.mark.skipif("avx512_vnni" not in ISAS, reason="not on this processor")
def test_rows_of_avx512_vnni_do_not_depend_on_each_other():
    w = random_matrix(5, 300, 200, 64)
    x = np.array(random_rows(9, 300))
    x[2, 7], x[3, 80], x[4, 5], x[5] = 1e3, 1e9, np.nan, 0  # other numbers of digits, and none
    y = np.asarray(product(jnp.asarray(x), w, isa="avx512_vnni"))
    for m in range(9):
        assert equal_bits(product(jnp.asarray(x[m : m + 1]), w, isa="avx512_vnni"), y[m : m + 1])


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_result_does_not_depend_on_threads_layout_or_run(isa, rows):
    w = random_matrix(5, 300, 1000, 128)
    x = random_rows(rows, 300)
    want = product(x, w, isa=isa)
    for threads, target in itertools.product((1, 2, 3, 0), TARGETS):
        assert equal_bits(product(x, w, isa=isa, threads=threads, target=target), want)


@needs_library
@pytest.mark.parametrize("bits", range(1, 9))
def test_restore_undoes_prepare(bits):
    w = random_segments((bits, 4), (128, 70), 130)
    back = BACKEND.restore(lay_out(w, BACKEND, "blocked"))
    assert jax.tree.structure(back) == jax.tree.structure(w.segments)
    assert all(map(equal_bits, jax.tree.leaves(back), jax.tree.leaves(w.segments)))


NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)


@needs_library
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in INTEGERS_ONLY])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_codebook_of_any_numbers(isa, bits):
    rng = np.random.default_rng(bits)
    K, N, group = 300, 150, 64
    codebook = NF4 if bits == 4 else rng.standard_normal(1 << bits).astype(np.float32)
    codes, scales = rng.integers(0, 1 << bits, (K, N)), rng.uniform(0.5, 1.5, (-(-K // group), N)).astype(np.float32)
    dense = codebook.astype(np.float64)[codes] * scales[np.arange(K) // group]
    planes = tuple(jnp.asarray(p) for p in numpy_planes(codes, bits))
    for rows in (1, 2, 4, 11):
        x = random_rows(rows, K)
        y = codebook_matmul(
            x,
            planes,
            jnp.asarray(scales),
            jnp.asarray(codebook),
            bits=bits,
            group_size=group,
            config=CpuConfig(isa=isa),
        )
        x64 = np.asarray(x, np.float64)
        assert (np.abs(np.asarray(y) - x64 @ dense) <= 4e-6 * (np.abs(x64) @ np.abs(dense))).all()


@needs_library
def test_integers_as_a_codebook_are_the_integer_product():
    w = random_matrix(4, 256, 128, 64, asymmetric=False)
    x = random_rows(3, 256)
    y = codebook_matmul(x, w.planes, w.scales, jnp.arange(16.0) - w.zero_point, bits=4, group_size=64)
    assert_product(y, x, w)


@needs_library
@pytest.mark.parametrize("isa", INTEGERS_ONLY)
def test_integers_only_are_not_taken_for_a_codebook(isa):
    if isa not in library().supported:
        pytest.skip(f"this processor has {', '.join(library().supported)}")
    w = random_matrix(4, 64, 32, 64)
    with pytest.raises(Exception, match=f"{isa} does not serve this product"):
        codebook_matmul(
            random_rows(8, 64), w.planes, w.scales, jnp.arange(16.0), bits=4, group_size=64, config=CpuConfig(isa=isa)
        )


@needs_library
@pytest.mark.parametrize("wrong", ["codes", "scales", "channels", "group"])
def test_operands_that_do_not_fit_are_refused_by_the_library(wrong):
    w = random_matrix(4, 64, 32, 32, asymmetric=False)
    facts = {"planes": w.planes, "scales": w.scales, "zeros": None, "zero_point": 8.0}
    facts |= {"bits": w.bits, "group_size": 32, "in_features": 64}
    facts |= {"codes": {"planes": (w.planes[0][1:],)}, "scales": {"scales": w.scales[1:]}, "channels": {}}.get(
        wrong, {}
    )
    if wrong == "group":
        facts["group_size"] = 48
    x = random_rows(2, 65 if wrong == "channels" else 64)
    message = {"codes": "a plane is not", "scales": "not of the segment's", "channels": "another number", "group": "32"}
    with pytest.raises(Exception, match=message[wrong]):
        call(x, [Operand(**facts)], out_features=32, out_dtype=jnp.float32, prepared=False).block_until_ready()


@needs_library
def test_inside_jit_scan_vmap_and_grad():
    w = random_matrix(4, 128, 96, 64)
    run = functools.partial(quantized_matmul, w=w, backend="cpu")
    x = random_rows(6, 128).reshape(3, 2, 128)
    want = np.asarray(run(x))
    np.testing.assert_array_equal(jax.jit(run)(x), want)
    np.testing.assert_allclose(jax.lax.map(run, x), want, rtol=1e-5, atol=1e-5)  # other kernels serve two rows
    np.testing.assert_allclose(jax.vmap(run)(x), want, rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda x: run(x).sum())(x)
    np.testing.assert_allclose(grad[0, 0], np.asarray(w.dequantize()).sum(1), rtol=1e-4, atol=1e-5)


def test_a_group_of_no_whole_blocks_is_refused():
    from lq_kernels.dispatch import problem_of

    w = random_matrix(4, 96, 16, 48)
    reason = BACKEND.refuses(problem_of(1, "float32", w, "float32", None))
    assert reason == library().reason or "groups of 48 channels" in reason


def test_status_says_why_there_is_no_library(monkeypatch):
    monkeypatch.setattr(building, "find", lambda: None)
    monkeypatch.setattr(building, "compiler", lambda: None)
    library.cache_clear()
    try:
        reason = "no C++ compiler when it was installed; run python -m lq_kernels.cpu.build"
        assert cpu.status() == f"absent: {reason}"
        w = random_matrix(4, 64, 16, 64)
        from lq_kernels.dispatch import problem_of

        assert BACKEND.refuses(problem_of(1, "float32", w, "float32", None)) == reason
        with pytest.raises(NotImplementedError, match="no C"):
            quantized_matmul(random_rows(1, 64), w, backend="cpu")
    finally:
        library.cache_clear()
