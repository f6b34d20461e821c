"""Randomized Hadamard rotations of any size: orthogonal, fast to apply, and known from a seed alone.

    R = diag(signs) (F_1 kron ... kron F_m),        n = n_1 ... n_m

A factor F_i `[n_i, n_i]` is a Hadamard matrix over sqrt(n_i), all of its entries of one magnitude, so that R spreads
what lies in one channel evenly over all n. There are Hadamard matrices here of these orders:

    2^m              Sylvester (1867)
    q + 1            Paley (1933), construction I: q a prime power, q = 3 mod 4      (12, 20, 24, 28, 44, 344 ...)
    2 (q + 1)        Paley (1933), construction II: q a prime power, q = 1 mod 4     (36, 52, 76, 100, 148 ...)

A size that is no product of such orders has a random orthogonal factor for the odd rest (7 of 14), which spreads evenly
on average. Signs come from SHA-256 and not from a library's generator: models are stored with a seed, and the same seed
must give the same rotation for ever. For the same reason the choice of the factors, `factor_orders`, may never change.

Applied factor by factor, x R costs n_1 + ... + n_m multiplications an element instead of n.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WIDEST = 512  # order of a Hadamard factor
PASS = 128  # what going through an array once more is worth, in multiplications an element


def rotate_hadamard(
    x: Float[Array, "..."], seed: int, place: str, *, axis: int = -1, inverse: bool = False
) -> Float[Array, "..."]:
    """x R along an axis: each vector along it, as a row, times R. Differentiable, and the same under jit.

    Args:
      x: any float dtype, which is kept; computed in float32, in float64 where x is that.
      seed: any whole number.
      place: what is rotated. Places have independent signs under one seed.
      axis: the axis of the vectors, its length is the size of R.
      inverse: x R^T instead.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return _rotated(x.astype(wide), seed, place, axis, inverse, product).astype(x.dtype)


def rotate_on_host(x: np.ndarray, seed: int, place: str, *, axis: int = -1, inverse: bool = False) -> np.ndarray:
    """`rotate_hadamard` in float64 NumPy, for weights: along axis -2 of a weight W it is R^T W."""
    return _rotated(np.asarray(x, np.float64), seed, place, axis, inverse, np.matmul)


def randomized_hadamard(n: int, seed: int, place: str) -> Float[np.ndarray, "n n"]:
    """R itself, float64."""
    return rotate_on_host(np.eye(n), seed, place)


def hadamard_matrix(n: int) -> np.ndarray:
    """A Hadamard matrix: int8 `[n, n]`, entries +1 and -1, orthogonal rows. ValueError for an order there is none of.

    Of `factor_orders` several, it is their matrices' Kronecker product.
    """
    orders = factor_orders(n)
    if any(order % 2 for order in orders):
        raise ValueError(f"no Hadamard matrix of order {n} here")
    return functools.reduce(np.kron, map(_hadamard_factor, orders), np.ones((1, 1), np.int8))


@functools.cache
def factor_orders(n: int) -> tuple[int, ...]:
    """n_1 to n_m, their product n, the cheapest to apply. An odd one is a random factor and comes first."""
    for rest in range(1, n + 1, 2):
        if n % rest == 0 and (orders := _cheapest_orders(n // rest)) is not None:
            return orders if rest == 1 else (rest, *orders)
    raise ValueError(f"a rotation of {n} channels")


@functools.cache
def _cheapest_orders(n: int, least: int = 2) -> tuple[int, ...] | None:
    """Orders of Hadamard matrices from `least` up whose product is n; None where there are none."""
    if n == 1:
        return ()
    divisors = [k for k in range(least, min(n, WIDEST) + 1) if n % k == 0 and _construction(k)]
    others = {order: _cheapest_orders(n // order, order) for order in divisors}
    found = [(order, *rest) for order, rest in others.items() if rest is not None]
    return min(found, key=lambda orders: (sum(orders) + PASS * len(orders), len(orders)), default=None)


def signs(n: int, seed: int, place: str) -> np.ndarray:
    """n signs, +1 or -1 in float64: the bits of SHA-256("signs {place} {seed} {0, 1, ...}"), high ones first."""
    data = _sha256_bytes(f"signs {place} {seed}", -(-n // 8))
    return 1.0 - 2.0 * np.unpackbits(np.frombuffer(data, np.uint8))[:n]


def _rotated(x: Any, seed: int, place: str, axis: int, inverse: bool, product: Callable) -> Any:
    """Along the axis, seen as `[left, n_i, right]` for each factor, a product with its transpose from the left."""
    axis %= x.ndim
    n, shape, lead = x.shape[axis], x.shape, x.shape[:axis]
    column = signs(n, seed, place).reshape(n, *(1,) * (x.ndim - axis - 1)).astype(x.dtype)
    if not inverse:
        x = x * column
    left, right = 1, n * math.prod(shape[axis + 1 :])
    for order in factor_orders(n):
        factor = (_factor(order).T if inverse else _factor(order)).astype(x.dtype)
        right //= order
        if right == 1:
            x = product(x.reshape(*lead, left, order), factor)
        else:
            x = product(factor.T, x.reshape(*lead, left, order, right))
        left *= order
    x = x.reshape(shape)
    return x * column if inverse else x


@functools.cache
def _factor(order: int) -> np.ndarray:
    """Orthogonal, float64 `[order, order]`."""
    if order % 2:
        return _random_orthogonal(order)
    return _hadamard_factor(order) / math.sqrt(order)


def _construction(order: int) -> Callable[[], np.ndarray] | None:
    """How a Hadamard matrix of this order is made in one piece; None where that is not known here."""
    if order & (order - 1) == 0:
        return functools.partial(_sylvester, order)
    if order % 4 == 0 and (field := _prime_power(order - 1)):  # q = 3 mod 4
        return functools.partial(_paley_i, *field)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and (field := _prime_power(order // 2 - 1)):
        return functools.partial(_paley_ii, *field)
    return None


def _hadamard_factor(order: int) -> np.ndarray:
    make = _construction(order)
    if make is None:
        raise ValueError(f"no construction of a Hadamard matrix of order {order} here")
    return make()


def _sylvester(order: int) -> np.ndarray:
    H = np.ones((1, 1), np.int8)
    while len(H) < order:
        H = np.block([[H, H], [H, -H]])
    return H


def _paley_i(p: int, degree: int) -> np.ndarray:
    """I + S, where S is the Jacobsthal matrix Q, antisymmetric, bordered by 1 and -1. Order p^degree + 1."""
    Q = _jacobsthal(p, degree)
    one = np.ones((len(Q), 1), np.int8)
    return np.eye(len(Q) + 1, dtype=np.int8) + np.block([[np.zeros((1, 1), np.int8), one.T], [-one, Q]])


def _paley_ii(p: int, degree: int) -> np.ndarray:
    """C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]], where C is Q, symmetric, bordered by 1."""
    Q = _jacobsthal(p, degree)
    one = np.ones((len(Q), 1), np.int8)
    C = np.block([[np.zeros((1, 1), np.int8), one.T], [one, Q]])
    on, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(C, on) + np.kron(np.eye(len(C), dtype=np.int8), diagonal)


def _jacobsthal(p: int, degree: int) -> np.ndarray:
    """Q[a, b] = 0 where a = b, +1 where a - b is a square in GF(p^degree), else -1.

    An element is a polynomial over GF(p), written as the number with its coefficients as digits to the base p.
    """
    powers = p ** np.arange(degree)
    elements = np.arange(p**degree)[:, None] // powers % p
    character = np.full(len(elements), -1, np.int8)
    character[_squares(elements, p) @ powers] = 1
    character[0] = 0
    return character[(elements[:, None] - elements[None]) % p @ powers]


def _squares(elements: np.ndarray, p: int) -> np.ndarray:
    """The square of each element `[q, degree]`, lowest coefficient first."""
    q, degree = elements.shape
    square = np.zeros((q, 2 * degree - 1), np.int64)
    for i in range(degree):
        square[:, i : i + degree] += elements[:, i : i + 1] * elements
    modulus = _irreducible(p, degree) if degree > 1 else 0
    for i in range(2 * degree - 2, degree - 1, -1):  # x^degree = -modulus
        square[:, i - degree : i] -= square[:, i : i + 1] * modulus
    return square[:, :degree] % p


def _irreducible(p: int, degree: int) -> np.ndarray:
    """The lower coefficients of a monic irreducible polynomial over GF(p), of degree 2 or 3: of one without roots.

    The first in the order of the numbers that its coefficients write to the base p.
    """
    powers = np.arange(degree)
    coefficients = np.arange(p**degree)[:, None] // p**powers % p
    x = np.arange(p)[:, None]
    values = (x**degree + x**powers @ coefficients.T) % p  # [x, polynomial]
    return coefficients[values.all(0).argmax()]


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, degree) where q = p^degree with a prime p > 2 and a degree up to 3, else None."""
    for degree in (1, 2, 3):
        p = round(q ** (1 / degree))
        if p > 2 and p**degree == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, degree
    return None


def _random_orthogonal(order: int) -> np.ndarray:
    """The orthogonal part of a Gaussian matrix, uniformly distributed (arXiv math-ph/0609050); a fixed one per order.

    Box and Muller's Gaussians, of 53 bits each of SHA-256("orthogonal {order} {0, 1, ...}").
    """
    words = np.frombuffer(_sha256_bytes(f"orthogonal {order}", 16 * order * order), ">u8").reshape(2, order, order)
    u, v = (words >> np.uint64(11)) * 2.0**-53
    Q, R = np.linalg.qr(np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v))
    return Q * np.sign(np.diag(R))  # which makes Q unique, whatever the library's convention


def _sha256_bytes(label: str, count: int) -> bytes:
    blocks = (hashlib.sha256(f"{label} {i}".encode()).digest() for i in range(-(-count // 32)))
    return b"".join(blocks)[:count]
