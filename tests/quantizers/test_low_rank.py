"""The low-rank residual against float64 singular values (Eckart and Young), and what rounding it to 8 bits costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.numerics.matmul import matmul
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import quantize_matrix
from lq.quantizers.low_rank import low_rank_factors, low_rank_residual, with_residual
from lq.quantizers.rtn import RTNOptions

pytestmark = pytest.mark.once

K, N = 96, 64


def error_of(*lead, seed=0):
    """What rounding to 2 bits leaves of Gaussian weights, nearly white."""
    weight = np.random.default_rng(seed).standard_normal((*lead, K, N)).astype(np.float32)
    tensor = quantize_matrix(jnp.asarray(weight), None, QuantSpec(bits=2, group_size=32), "rtn", RTNOptions())
    return weight - np.asarray(tensor.dequantize())


def hessian_of(tokens, seed=1):
    """X and X^T X of correlated inputs, some channels of which are a hundred times stronger than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, K)) @ (np.eye(K) + 0.2 * rng.standard_normal((K, K)))
    x = (x * np.logspace(-1, 1, K)).astype(np.float32)
    return x, jnp.asarray(x.T @ x)


def product(factors):
    left, right = (np.asarray(f.dequantize() if isinstance(f, QTensor) else f, np.float64) for f in factors)
    return left @ right


@pytest.mark.parametrize("rank", [1, 8, 63, 64])
def test_what_is_left_is_the_energy_of_the_other_singular_values(rank):
    error = error_of()
    values = np.linalg.svd(error.astype(np.float64), compute_uv=False)
    left, right = low_rank_factors(jnp.asarray(error), rank)
    assert left.shape == (K, rank)
    assert right.shape == (rank, N)
    # float32 factors are off by some 1e-6 of the largest singular value, and the energy by that squared and more.
    remainder = np.square(error - product((left, right))).sum()
    assert remainder == pytest.approx(np.square(values[rank:]).sum(), rel=1e-5, abs=1e-9 * np.square(values).sum())
    for norms in (np.square(left).sum(0), np.square(right).sum(1)):
        np.testing.assert_allclose(norms, values[:rank], rtol=1e-5, err_msg="half of each singular value on each side")


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_with_a_hessian_the_error_of_the_outputs_is_the_least_possible(rank):
    error, (_, hessian) = error_of().astype(np.float64), hessian_of(512)
    damped = np.asarray(hessian, np.float64)
    damped += 0.01 * np.trace(damped) / K * np.eye(K)
    root = np.linalg.cholesky(damped).T  # another root than the code's: only root^T root = H matters
    values = np.linalg.svd(root @ error, compute_uv=False)
    factors = low_rank_factors(jnp.asarray(error, jnp.float32), rank, hessian)
    remainder = np.square(root @ (error - product(factors))).sum()
    # The eigenvectors of H are float32: of its condition, 1e4 after damping, 1e-7 each is lost at worst.
    assert remainder == pytest.approx(np.square(values[rank:]).sum(), rel=1e-3, abs=1e-6 * np.square(values).sum())


def test_a_hessian_takes_more_off_the_outputs_and_less_off_the_weights():
    error, (x, hessian) = jnp.asarray(error_of()), hessian_of(512)
    spec = QuantSpec(bits=2, rank=8)
    plain, weighed = (np.asarray(error) - product(low_rank_residual(error, spec, h)) for h in (None, hessian))
    assert np.square(x @ weighed).sum() < 0.6 * np.square(x @ plain).sum()
    assert np.square(weighed).sum() > np.square(plain).sum()


@pytest.mark.parametrize("rank", [1, 8, 200])
def test_rounding_to_8_bits_stays_within_its_steps(rank):
    error = jnp.asarray(error_of())
    left, right = (np.asarray(f, np.float64) for f in low_rank_factors(error, min(rank, N)))
    packed = low_rank_residual(error, QuantSpec(bits=2, rank=rank))
    assert [(f.spec, f.shape) for f in packed] == list(QuantSpec(bits=2, rank=rank).residual((K, N)))
    steps = [np.abs(np.asarray(f.scales, np.float64)) for f in packed]
    rounded = [np.asarray(f.dequantize(), np.float64) for f in packed]
    # A value is off by half a step, and by one where it is opposite the largest: codes go from -128 to 127. Scales are
    # bfloat16, off by 2^-9, which moves the ends by 128 * 2^-9 = a quarter of a step more.
    for exact, got, step in zip((left, right), rounded, steps, strict=True):
        assert (np.abs(exact - got) <= 1.25 * step * (1 + 1e-4)).all()
    bound = 1.25 * (steps[0] @ np.abs(right) + np.abs(rounded[0]).sum(1, keepdims=True) * steps[1]) * (1 + 1e-4)
    assert (np.abs(product(packed) - left @ right) <= bound).all()


def test_full_rank_in_8_bits_leaves_a_hundredth():
    """Rounding in steps of max / 128 costs a factor (max / 128)^2 / 12 per value. The maximum is 3 to 4 deviations: 0.5
    to 0.8e-4 of the energy for each factor, and for both together 1 % of the norm."""
    error = error_of()
    remainder = error - product(low_rank_residual(jnp.asarray(error), QuantSpec(bits=2, rank=N)))
    assert np.square(remainder).sum() < 2e-4 * np.square(error).sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [None, 3, 40, 512])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_error_never_increases(seed, tokens, rank):
    error, (x, hessian) = error_of(seed=seed), (np.eye(K), None) if tokens is None else hessian_of(tokens, seed)
    remainder = error - product(low_rank_residual(jnp.asarray(error), QuantSpec(bits=2, rank=rank), hessian))
    assert np.square(x @ remainder).sum() < np.square(x @ error).sum()


def test_an_error_outside_of_all_inputs_is_left_alone():
    """Then the factors could only bring rounding into the outputs."""
    x, hessian = hessian_of(16)
    error = error_of().astype(np.float64)
    error -= np.linalg.pinv(x.astype(np.float64)) @ (x @ error)
    assert np.abs(x @ error).max() < 1e-9
    factors = low_rank_residual(jnp.asarray(error, jnp.float32), QuantSpec(bits=2, rank=64), hessian)
    assert (product(factors) == 0).all()
    assert (product(low_rank_residual(jnp.asarray(error, jnp.float32), QuantSpec(bits=2, rank=64))) != 0).any()


def test_no_error_no_residual():
    assert (product(low_rank_residual(jnp.zeros((K, N)), QuantSpec(bits=2, rank=4))) == 0).all()


def test_experts_are_decomposed_each_by_itself_and_one_without_tokens_as_without_statistics():
    errors, hessian = error_of(3), hessian_of(512)[1]
    hessians = jnp.stack([hessian, jnp.zeros((K, K)), 3.0 * jnp.eye(K)])
    spec = QuantSpec(bits=2, rank=4)
    stacked = product(low_rank_residual(jnp.asarray(errors), spec, hessians))
    for i, alone in enumerate((hessian, None, None)):
        want = product(low_rank_residual(jnp.asarray(errors[i]), spec, alone))
        # Code by code but for values on a tie: an entry is a sum of 4 products, each off by a step of either factor.
        np.testing.assert_allclose(stacked[i], want, atol=4 * np.abs(want).max() / 64)
        assert np.square(stacked[i] - want).sum() < 1e-4 * np.square(want).sum()


@pytest.mark.parametrize("fields", [{}, {"symmetric": True}, {"zero_dtype": "bfloat16"}])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_quantized_matrix_has_the_residual_of_its_spec(fields, lead):
    weight = np.random.default_rng(2).standard_normal((*lead, K, N)).astype(np.float32)
    spec = QuantSpec(bits=2, group_size=32, rank=8, **fields)
    tensor = quantize_matrix(jnp.asarray(weight), None, spec, "rtn", RTNOptions())
    assert tensor.spec == spec
    assert tensor.nbytes * 8 == spec.size_bits(weight.shape)
    base = quantize_matrix(jnp.asarray(weight), None, QuantSpec(bits=2, group_size=32, **fields), "rtn", RTNOptions())
    np.testing.assert_array_equal(np.asarray(tensor.codes()), np.asarray(base.codes()))
    errors = (np.square(np.asarray(t.dequantize()) - weight).sum((-1, -2)) for t in (tensor, base))
    with_residual, without = errors
    values = np.linalg.svd((weight - np.asarray(base.dequantize())).astype(np.float64), compute_uv=False)
    share = np.square(values[..., :8]).sum(-1) / np.square(values).sum(-1)
    np.testing.assert_allclose(with_residual, (1 - share) * without, rtol=1e-3)
    if not lead:
        x = np.random.default_rng(3).standard_normal((5, K)).astype(np.float32)
        np.testing.assert_allclose(matmul(jnp.asarray(x), tensor), x @ np.asarray(tensor.dequantize()), atol=2e-4)


def test_under_jit_and_eval_shape():
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((K, N)), jnp.float32)
    base = quantize_matrix(weight, None, QuantSpec(bits=2, group_size=32), "rtn", RTNOptions())
    run = functools.partial(with_residual, rank=4)
    plain, jitted, abstract = run(base, weight), jax.jit(run)(base, weight), jax.eval_shape(run, base, weight)
    assert jax.tree.structure(plain) == jax.tree.structure(jitted) == jax.tree.structure(abstract)
    for a, b, c in zip(*map(jax.tree.leaves, (plain, jitted, abstract)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)
    np.testing.assert_allclose(plain.dequantize(), jitted.dequantize(), atol=0.02)


def test_a_spec_without_a_rank_has_no_residual():
    with pytest.raises(ValueError, match="int2-g128 has no low-rank residual"):
        low_rank_residual(jnp.zeros((K, N)), QuantSpec(bits=2))
