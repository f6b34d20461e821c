"""Rotations of any size: orthogonal, as fast as their factors, and the same for the same seed for ever."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lq.numerics.hadamard import (
    factor_orders,
    hadamard_matrix,
    randomized_hadamard,
    rotate_hadamard,
    rotate_on_host,
    signs,
)

pytestmark = pytest.mark.once

# Stored models were rotated by these: a change of a line here makes every one of them unreadable.
ORDERS = {
    1: (),
    2: (2,),
    3: (3,),
    14: (7, 2),
    25: (25,),
    40: (2, 20),
    64: (64,),
    80: (80,),
    92: (23, 4),
    96: (8, 12),
    128: (128,),
    256: (16, 16),
    768: (24, 32),
    896: (28, 32),
    1600: (20, 80),
    2048: (32, 64),
    3072: (48, 64),
    4096: (64, 64),
    5120: (64, 80),
    11008: (32, 344),
    13824: (24, 24, 24),
    14336: (16, 28, 32),
    18944: (128, 148),
    28672: (28, 32, 32),
    29568: (24, 28, 44),
}
FACTORS = sorted({order for orders in ORDERS.values() for order in orders})


def factor(order: int) -> np.ndarray:
    """Orthogonal; a random one is read off a rotation of its size."""
    if order % 2:
        return signs(order, 0, "")[:, None] * randomized_hadamard(order, 0, "")
    return hadamard_matrix(order) / math.sqrt(order)


@pytest.mark.parametrize("n", ORDERS)
def test_the_factors_of_a_size_are_fixed(n):
    assert factor_orders(n) == ORDERS[n]
    assert math.prod(ORDERS[n]) == n


def has_hadamard_matrix(n: int) -> bool:
    return not any(order % 2 for order in factor_orders(n))


def test_there_are_hadamard_matrices_of_nearly_all_orders():
    """Up to 200 products of Sylvester's and Paley's leave out these multiples of four."""
    missing = [n for n in range(4, 201, 4) if not has_hadamard_matrix(n)]
    assert missing == [92, 116, 156, 172, 184, 188]
    assert [n for n in range(1, 201) if n % 4 and has_hadamard_matrix(n)] == [1, 2]


@pytest.mark.parametrize("n", [n for n in range(1, 513) if n <= 2 or n % 4 == 0])
def test_hadamard_matrices_are_hadamard_matrices(n):
    """In whole numbers. It is the whole proof for prime powers, whose squares are those of polynomials."""
    if not has_hadamard_matrix(n):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {n} here"):
            hadamard_matrix(n)
        return
    H = hadamard_matrix(n).astype(int)
    assert (np.abs(H) == 1).all()
    np.testing.assert_array_equal(H @ H.T, n * np.eye(n, dtype=int))


@pytest.mark.parametrize("n", [1, 2, 64, 256, 1024])
def test_powers_of_two_are_scipys(n):
    np.testing.assert_array_equal(hadamard_matrix(n), scipy.linalg.hadamard(n))


@pytest.mark.parametrize(("n", "q"), [(12, 11), (44, 43)])
def test_paleys_matrix_is_that_of_eulers_criterion(n, q):
    """a is a square modulo a prime q where a^((q-1)/2) = 1."""
    H = hadamard_matrix(n)
    for i in range(q):
        for j in range(q):
            square = pow(i - j, (q - 1) // 2, q) == 1
            assert H[i + 1, j + 1] == (1 if i == j or square else -1)


def test_nothing_has_no_rotation():
    with pytest.raises(ValueError, match="a rotation of 0 channels"):
        factor_orders(0)


@pytest.mark.parametrize("order", FACTORS)
def test_factors_are_orthogonal(order):
    """A sum of n products errs by n roundings of half a unit at most, Householder's QR by a small multiple of that."""
    F = factor(order)
    assert np.abs(F @ F.T - np.eye(order)).max() <= (4 if order % 2 else 1) * order * 2.0**-53


def kronecker(n: int) -> np.ndarray:
    return functools.reduce(np.kron, map(factor, ORDERS[n]), np.ones((1, 1)))


@pytest.mark.parametrize("n", [n for n in ORDERS if n <= 1600])
def test_the_matrix_is_signs_times_the_kronecker_product(n):
    R = randomized_hadamard(n, 5, "place")
    np.testing.assert_allclose(R, np.diag(signs(n, 5, "place")) @ kronecker(n), atol=1e-15)
    assert np.abs(R @ R.T - np.eye(n)).max() <= 1e-12
    if n in (12, 64, 80, 96, 128, 256, 768, 896, 1600):
        np.testing.assert_allclose(np.abs(R), n**-0.5, rtol=1e-12)
        np.testing.assert_array_equal(np.sign(R), np.diag(signs(n, 5, "place")) @ hadamard_matrix(n))


def relative_error(y, exact) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("n", ORDERS)
def test_applied_online_it_is_the_product_with_the_matrix(n):
    """A sum of n_i rounded terms errs like a walk of n_i steps, sqrt(n_i) half units; twice that is allowed for."""
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    exact = rotate_on_host(x, 1, "down")
    if n <= 5120:
        columns = np.random.default_rng(0).integers(0, n, 8)
        R = signs(n, 1, "down")[:, None] * kronecker_columns(n, columns)
        np.testing.assert_allclose(exact[:, columns], x.astype(np.float64) @ R, atol=1e-13 * n**0.5)
    walk = 1 + sum(math.sqrt(order) for order in ORDERS[n])
    assert relative_error(rotate_hadamard(jnp.asarray(x), 1, "down"), exact) <= 2 * walk * 2.0**-24
    back = rotate_hadamard(rotate_hadamard(jnp.asarray(x), 1, "down"), 1, "down", inverse=True)
    assert relative_error(back, x) <= 4 * walk * 2.0**-24
    assert relative_error(rotate_on_host(exact, 1, "down", inverse=True), x) <= 4 * walk * 2.0**-53


def kronecker_columns(n: int, columns: np.ndarray) -> np.ndarray:
    """Columns of the Kronecker product: each the Kronecker product of one column a factor."""
    made = []
    for column in columns:
        whole, places = np.ones(1), np.unravel_index(column, ORDERS[n]) if ORDERS[n] else ()
        for order, place in zip(ORDERS[n], places, strict=True):
            whole = np.kron(whole, factor(order)[:, place])
        made.append(whole)
    return np.stack(made, axis=1)


@pytest.mark.parametrize("n", [14, 96, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_leading_axes_any_dtype_any_axis_and_under_jit(n, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, n, 5)), dtype)
    R = randomized_hadamard(n, 3, "heads")
    exact = np.einsum("abic,ij->abjc", np.asarray(x, np.float64), R)
    for run in (rotate_hadamard, jax.jit(rotate_hadamard, static_argnums=(1, 2), static_argnames="axis")):
        y = run(x, 3, "heads", axis=-2)
        assert y.dtype == dtype
        assert y.shape == x.shape
        # One rounding to the dtype, of at most half a unit, and those of the float32 computation.
        assert relative_error(y, exact) <= float(jnp.finfo(dtype).eps) / 2 + 32 * 2.0**-24
    last = rotate_hadamard(x.swapaxes(-1, -2), 3, "heads")
    np.testing.assert_array_equal(last.astype(jnp.float32) != 0, np.ones(last.shape, bool))
    assert relative_error(last, exact.swapaxes(-1, -2)) <= float(jnp.finfo(dtype).eps) / 2 + 32 * 2.0**-24


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 96)))
        y = rotate_hadamard(x, 0, "residual")
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, np.asarray(x) @ randomized_hadamard(96, 0, "residual"), atol=1e-14)


def test_rows_of_a_weight_are_turned_back():
    W = np.random.default_rng(0).standard_normal((2, 80, 7))
    R = randomized_hadamard(80, 0, "residual")
    np.testing.assert_allclose(rotate_on_host(W, 0, "residual", axis=-2), R.T @ W, atol=1e-14)
    np.testing.assert_allclose(rotate_on_host(W, 0, "residual", axis=1, inverse=True), R @ W, atol=1e-14)


def test_no_rows_stay_no_rows():
    assert rotate_hadamard(jnp.zeros((2, 0, 96)), 0, "down").shape == (2, 0, 96)


def test_its_gradient_is_the_inverse_rotation():
    c = jnp.asarray(np.random.default_rng(0).standard_normal(96), jnp.float32)
    gradient = jax.grad(lambda x: rotate_hadamard(x, 0, "down") @ c)(jnp.zeros(96))
    np.testing.assert_allclose(gradient, rotate_hadamard(c, 0, "down", inverse=True), atol=1e-6)


@pytest.mark.parametrize("n", [64, 896, 4096, 11008])
def test_an_outlier_is_spread_evenly(n):
    """All of the energy in one channel: afterwards as much in each."""
    x = np.zeros(n)
    x[n // 3] = n**0.5
    np.testing.assert_allclose(np.abs(rotate_on_host(x, 0, "residual")), 1.0, rtol=1e-12)


def drawn(n, seed, place) -> str:
    return "".join("+" if sign > 0 else "-" for sign in signs(n, seed, place))


def test_signs_are_the_bits_of_sha256_and_what_they_always_were():
    """The first 40 bits of SHA-256("signs residual 0 0"), 4ffee68711, a one for a minus."""
    assert drawn(40, 0, "residual") == f"{0x4FFEE68711:040b}".replace("0", "+").replace("1", "-")
    assert drawn(300, -7, "values block_3")[-20:] == "+----++---+++---++++"


def test_the_random_factor_is_what_it_always_was():
    expected = [
        [-0.06568438, 0.72101655, -0.68979757],
        [-0.99752757, -0.030137, 0.06348631],
        [0.02498626, 0.69226216, 0.72121342],
    ]
    np.testing.assert_allclose(factor(3), expected, atol=5e-9)


def test_seeds_and_places_have_signs_of_their_own():
    """Of 4096 fair signs two draws share half, give or take 32 (one standard deviation)."""
    draws = [signs(4096, seed, place) for seed, place in [(0, "residual"), (1, "residual"), (0, "down"), (0, "heads")]]
    for i, a in enumerate(draws):
        np.testing.assert_array_equal(a, signs(4096, (0, 1, 0, 0)[i], ("residual", "residual", "down", "heads")[i]))
        assert all(abs((a == b).sum() - 2048) < 5 * 32 for b in draws[:i])
