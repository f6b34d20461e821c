"""`quantized_matmul` on the backends that need no kernel, against float64 NumPy, and under JAX's transforms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import assert_product, random_matrix, random_rows, random_segments

from lq_kernels import prepare, quantized_matmul
from lq_kernels.reference import error_scale, reference_matmul, reference_weights
from lq_kernels.xla_scan import ScanConfig

BACKENDS = ["xla", "xla_scan"]
SHAPES = [(128, 128), (256, 384), (512, 100), (1000, 130), (96, 64)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256, None])
def test_every_width_and_group(backend, bits, asymmetric, group):
    K, N = SHAPES[(bits + (group or 0)) % len(SHAPES)]
    w = random_matrix(bits, K, N, group or K, asymmetric=asymmetric)
    x = random_rows(3, K)
    assert_product(quantized_matmul(x, w, backend=backend, config=small_chunks(backend)), x, w)


def small_chunks(backend):
    """Several chunks and a remainder even in a small matrix."""
    return ScanConfig(chunk=256) if backend == "xla_scan" else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 257])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_dtype_and_number_of_rows(backend, rows, dtype):
    w = random_matrix(3, 1000, 130, 128)
    x = random_rows(rows, 1000, dtype)
    assert_product(quantized_matmul(x, w, backend=backend), x, w, rounds_weights=True)
    y = quantized_matmul(x, w, backend=backend, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert_product(y, x, w, rounds_weights=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        {"codes": 0},
        {"codes": 15},
        {"zeros": 0},
        {"zeros": 15},
        {"scales": 0.0},
        {"scales": 1e-38},
        {"scales": 1e30},
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()),
)
def test_extreme_codes_zeros_and_scales(backend, case):
    w = random_matrix(4, 256, 64, **{k: np.asarray(v) for k, v in case.items()})
    x = random_rows(4, 256, mean=100.0 if "zeros" in case else 0.0)
    assert_product(quantized_matmul(x, w, backend=backend), x, w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(backend, bad):
    w = random_matrix(4, 200, 64, 64)
    x = random_rows(5, 200).at[2, 17].set(bad)
    y = np.asarray(quantized_matmul(x, w, backend=backend))
    assert not np.isfinite(y[2]).any()
    clean = np.delete(np.arange(5), 2)
    assert_product(y[clean], x[clean], w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lengths", "group"), [((128, 256, 128, 128), 128), ((256, 128, 512, 104), 128), ((64, 32, 96, 40), 32)]
)
@pytest.mark.parametrize("permuted", [False, True])
def test_segments_of_different_widths(backend, lengths, group, permuted):
    w = random_segments((2, 3, 4, 8), lengths, 130, group, permuted=permuted)
    x = random_rows(3, sum(lengths))
    assert_product(quantized_matmul(x, w, backend=backend, config=small_chunks(backend)), x, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_permuted_product_in_bfloat16(backend):
    """XLA's CPU has no bfloat16 dot for the layout that a gather of channels would give its left side."""
    w = random_segments((4, 2), (128, 128), 128, 64, scale_dtype=jnp.bfloat16)
    x = random_rows(3, 256, jnp.bfloat16)
    y = jax.jit(quantized_matmul, static_argnames="backend")(x, w, backend=backend)
    assert_product(y, x, w, rounds_weights=True)


@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 0, 256), (2, 3, 256)])
def test_leading_axes_of_any_number_and_length(shape):
    w = random_matrix(4, 256, 64)
    x = jnp.ones(shape)
    y = quantized_matmul(x, w)
    assert y.shape == (*shape[:-1], 64)
    assert_product(np.reshape(y, (-1, 64)), x.reshape(-1, 256), w)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_rows_are_lowered_for_every_platform(platform):
    """A product of no rows reaches the lowering when it is batched."""
    w = random_matrix(4, 256, 64)
    batched = jax.jit(jax.vmap(lambda x, w: quantized_matmul(x, w), in_axes=(0, None)))
    lowered = batched.trace(jnp.zeros((2, 0, 256)), w).lower(lowering_platforms=(platform,))
    assert "custom_call" not in lowered.as_text()
    assert jax.jit(quantized_matmul)(jnp.zeros((3, 256)), random_matrix(4, 256, 0)).shape == (3, 0)


def test_matrices_that_share_the_input_are_one_call():
    parts = [random_matrix(4, 256, n, seed=n) for n in (64, 32, 32)]
    x = random_rows(3, 256)
    for products in (quantized_matmul(x, parts), jax.jit(quantized_matmul)(x, prepare(parts, backend="xla"))):
        for y, w in zip(products, parts, strict=True):
            assert_product(y, x, w)


class TestTransforms:
    w = random_matrix(4, 256, 64, 32)
    x = random_rows(5, 256)

    def test_gradient_with_respect_to_x_is_the_transposed_product(self):
        y_bar = random_rows(5, 64, seed=3)
        _, pull = jax.vjp(lambda x: quantized_matmul(x, self.w), self.x)
        dense = reference_weights(self.w)
        got, want = np.asarray(pull(y_bar)[0], np.float64), np.asarray(y_bar, np.float64) @ dense.T
        assert (np.abs(got - want) <= 4e-6 * (np.abs(np.asarray(y_bar)) @ np.abs(dense.T))).all()

    def test_it_is_linear_in_x_forwards_too(self):
        _, y_dot = jax.jvp(lambda x: quantized_matmul(x, self.w), (self.x,), (2 * self.x,))
        assert_product(y_dot, 2 * self.x, self.w)

    def test_gradient_with_respect_to_the_scales(self):
        loss = lambda scales: quantized_matmul(self.x, dataclasses.replace(self.w, scales=scales)).sum()  # noqa: E731
        got = np.asarray(jax.grad(loss)(self.w.scales), np.float64)
        unit = reference_weights(dataclasses.replace(self.w, scales=jnp.ones_like(self.w.scales)))
        grouped = unit.reshape(-1, 32, 64) * np.asarray(self.x, np.float64).sum(0).reshape(-1, 32, 1)
        np.testing.assert_allclose(got, grouped.sum(1), atol=4e-6 * np.abs(grouped).sum(1).max())

    def test_second_derivatives(self):
        loss = lambda x: (quantized_matmul(x, self.w) ** 2).sum()  # noqa: E731
        hessian = np.asarray(jax.hessian(loss)(self.x[0]), np.float64)
        dense = reference_weights(self.w)
        np.testing.assert_allclose(hessian, 2 * dense @ dense.T, atol=1e-5 * np.abs(dense @ dense.T).max())

    def test_vmap_over_rows(self):
        x = jnp.stack([self.x, 3 * self.x], axis=1)
        y = jax.vmap(lambda x: quantized_matmul(x, self.w), in_axes=1)(x)
        assert_product(y.reshape(-1, 64), jnp.concatenate([self.x, 3 * self.x]), self.w)

    @pytest.mark.parametrize("each_its_own_rows", [False, True])
    def test_vmap_over_matrices(self, each_its_own_rows):
        matrices = [random_matrix(3, 256, 64, seed=s) for s in range(3)]
        stack = jax.tree.map(lambda *a: jnp.stack(a), *matrices)
        x = jnp.stack([self.x * (1 + each_its_own_rows * i) for i in range(3)])
        y = (
            jax.vmap(quantized_matmul)(x, stack)
            if each_its_own_rows
            else jax.vmap(quantized_matmul, in_axes=(None, 0))(self.x, stack)
        )
        for i, w in enumerate(matrices):
            assert_product(y[i], x[i], w)

    def test_scan_over_layers(self):
        matrices = [random_matrix(4, 128, 128, 32, seed=s, scales=np.asarray(1e-2)) for s in range(3)]
        stack = jax.tree.map(lambda *a: jnp.stack(a), *matrices)
        x = random_rows(2, 128)
        y, _ = jax.lax.scan(lambda x, w: (quantized_matmul(x, w), None), x, stack)
        for w in matrices[:-1]:
            x = jnp.asarray(reference_matmul(x, w), jnp.float32)
        # The rows entering the last layer are themselves off by two layers' bounds.
        assert (np.abs(np.asarray(y) - reference_matmul(x, matrices[-1])) <= 3e-5 * error_scale(x, matrices[-1])).all()

    def test_donated_rows(self):
        y = jax.jit(lambda x, w: quantized_matmul(x, w), donate_argnums=0)(self.x + 0, self.w)
        assert_product(y, self.x, self.w)

    def test_rematerialized(self):
        loss = lambda x: jnp.tanh(quantized_matmul(x, self.w)).sum()  # noqa: E731
        np.testing.assert_array_equal(jax.grad(jax.checkpoint(loss))(self.x), jax.grad(loss)(self.x))

    def test_equal_products_are_traced_once(self):
        text = (
            jax.jit(lambda x, w: quantized_matmul(quantized_matmul(x, w) @ jnp.ones((64, 256)), w))
            .lower(self.x, self.w)
            .as_text()
        )
        assert text.count("call @quantized_matmul") == 2
        assert text.count("func.func private @quantized_matmul") == 1


class TestRefusals:
    w = random_matrix(4, 64, 8, 32)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": jnp.ones((2, 63))}, "for a matrix of 64 input channels"),
            ({"x": jnp.ones((2, 64), jnp.int32)}, "x is int32; quantized_matmul takes bfloat16"),
            ({"backend": "cuda"}, "no backend is called 'cuda'; known: mosaic_gpu"),
            ({"interpret": True}, "interpret=True needs a backend"),
            ({"w": dataclasses.replace(w, zeros=w.zeros[:1])}, "zeros of shape"),
            (
                {"w": dataclasses.replace(w, planes=(w.planes[0][:, :1],))},
                r"4-bit planes of 64 channels are uint32\[8, 8\]",
            ),
            ({"w": dataclasses.replace(w, planes=())}, "got none"),
            ({"out_dtype": jnp.int32}, "out_dtype is int32; quantized_matmul gives bfloat16, float16, float32"),
            ({"out_dtype": np.float64}, "out_dtype is float64; quantized_matmul gives bfloat16, float16, float32"),
            ({"w": dataclasses.replace(w, group_size=0)}, "a group has at least one"),
            ({"w": dataclasses.replace(w, group_size=16)}, "64 channels in groups of 16 need 4 scales, got 2"),
        ],
    )
    def test_a_bad_argument_gets_one_line(self, change, message):
        arguments = {"x": jnp.ones((2, 64)), "w": self.w, **change}
        with pytest.raises(ValueError, match=message):
            quantized_matmul(arguments.pop("x"), arguments.pop("w"), **arguments)

    def test_a_segment_is_cut_at_multiples_of_32(self):
        w = random_segments((2, 4), (80, 128), 8, group=16)
        with pytest.raises(ValueError, match="segment 0: 80 channels; every segment but the last has a multiple of 32"):
            quantized_matmul(jnp.ones((2, 208)), w)

    @pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
    def test_accelerators_cut_segments_at_multiples_of_128(self, backend):
        w = random_segments((2, 4), (96, 128), 8, group=32)
        with pytest.raises(NotImplementedError, match="segment 0 of 96 channels: needs multiples of 128"):
            quantized_matmul(jnp.ones((2, 224)), w, backend=backend, interpret=True)

    def test_a_backend_of_another_platform(self):
        with pytest.raises(NotImplementedError, match="mosaic_gpu: runs on cuda, not on cpu"):
            quantized_matmul(jnp.ones((2, 64)), self.w, backend="mosaic_gpu")

    def test_a_configuration_of_another_backend(self):
        with pytest.raises(NotImplementedError, match="takes a XlaConfig, not a ScanConfig"):
            quantized_matmul(jnp.ones((2, 64)), self.w, backend="xla", config=ScanConfig())
