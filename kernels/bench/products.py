"""Times of single products: ours at every width beside the dense bfloat16 dot and XLA's own int4 paths.

Weights are read from memory, not from a cache: a chain of products runs over enough matrices (`lq_kernels.timing`).
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from lq_kernels import prepare, quantized_matmul
from lq_kernels.timing import Timing, compile_chains, copies_to_leave_cache, time_chains
from lq_kernels.tune import random_packed

GROUP = 128


@dataclasses.dataclass(frozen=True)
class Product:
    """One line of the table: y [rows, N] = x [rows, K] @ w, by one method."""

    method: str
    rows: int
    K: int
    N: int
    microseconds: float | None
    minimum: float | None = None
    quartiles: float | None = None
    weight_bytes: int | None = None
    temporary_bytes: int | None = None
    copies: int | None = None
    failure: str | None = None

    def moved_bytes(self) -> int:
        """What a perfect kernel moves: the weights as stored, x and y once, in 16 bits."""
        return self.weight_bytes + 2 * self.rows * (self.K + self.N)


def normal(shape, dtype, seed: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def int4_codes(K: int, N: int, seed: int):
    codes = jax.random.randint(jax.random.key(seed), (K, N), -8, 8, jnp.int8).astype(jnp.int4)
    return {"codes": codes, "scales": jnp.full((K // GROUP, N), 0.02, jnp.bfloat16)}


def int4_cast_then_dot(x, w):
    """XLA alone, scales left out: as fast as its fused path gets."""
    return x @ w["codes"].astype(x.dtype)


def int4_scaled_after_dot(x, w):
    K, N = w["codes"].shape
    parts = jnp.einsum(
        "mgk,gkn->gmn",
        x.reshape(x.shape[0], K // GROUP, GROUP),
        w["codes"].reshape(K // GROUP, GROUP, N).astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return (parts * w["scales"][:, None].astype(jnp.float32)).sum(0).astype(x.dtype)


def methods(widths, backend: str, *, interpret: bool = False) -> dict:
    """name -> (make(K, N, seed), product(x, w))."""
    ours = lambda x, w: quantized_matmul(x, w, backend=backend, interpret=interpret)  # noqa: E731
    found = {
        "bf16": (lambda K, N, seed: normal((K, N), jnp.bfloat16, seed), lambda x, w: x @ w),
        "xla int4 cast": (int4_codes, int4_cast_then_dot),
        "xla int4 scaled after": (int4_codes, int4_scaled_after_dot),
    }
    for bits in widths:
        make = lambda K, N, seed, bits=bits: prepare(  # noqa: E731
            random_packed(bits, K, N, GROUP, seed=seed), backend=backend
        )
        found[f"W{bits}"] = (make, ours)
    return found


def time_product(name: str, method, rows: int, K: int, N: int, *, cache_bytes: int, repeats: int) -> Product:
    """Times one method; what goes wrong is kept in `failure`."""
    make, product = method
    try:
        first = make(K, N, 0)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
        copies = copies_to_leave_cache(nbytes, cache_bytes)
        matrices = [first, *[jax.tree.map(jnp.copy, first) for _ in range(copies - 1)]]
        x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, K)), jnp.bfloat16)
        single = jax.jit(product).lower(x, first).compile()
        memory = single.memory_analysis()
        timing: Timing = time_chains(compile_chains(product, x, matrices), x, matrices, repeats)
    except Exception as problem:  # kept: "not supported here" is a result too
        return Product(name, rows, K, N, None, failure=f"{type(problem).__name__}: {problem}"[:300])
    return Product(
        name,
        rows,
        K,
        N,
        timing.median,
        timing.minimum,
        timing.quartiles,
        nbytes,
        getattr(memory, "temp_size_in_bytes", None),
        copies,
    )


def time_all(shapes, rows, widths, backend, *, cache_bytes, repeats, deadline, interpret=False) -> list[Product]:
    """In order of importance to the reader: shape by shape, few rows first, until `deadline`."""
    found = []
    for K, N in shapes:
        for m in rows:
            for name, method in methods(widths, backend, interpret=interpret).items():
                if time.monotonic() > deadline:
                    return found
                found.append(time_product(name, method, m, K, N, cache_bytes=cache_bytes, repeats=repeats))
    return found


def lines(products: list[Product], bandwidth: float) -> list[list]:
    """Rows of the printed table: time, GB/s, share of the copy bandwidth, speed-up over bf16 of the same shape."""
    dense = {(p.rows, p.K, p.N): p.microseconds for p in products if p.method == "bf16" and (p.microseconds or 0) > 0}
    found = []
    for p in products:
        where = [f"{p.K}x{p.N}", p.rows, p.method]
        if p.microseconds is None or p.microseconds <= 0:
            found.append([*where, (p.failure or "lost in noise")[:60], "", "", ""])
            continue
        rate = p.moved_bytes() / (p.microseconds * 1e-6)
        base = dense.get((p.rows, p.K, p.N))
        times = f"{base / p.microseconds:.2f}" if base else ""
        found.append([*where, f"{p.microseconds:.1f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}", times])
    return found


HEADER = ["KxN", "M", "method", "us", "GB/s", "of copy", "x bf16"]
