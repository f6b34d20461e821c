"""float32 and float16 activations for kernels that multiply bfloat16.

A float32 number is the sum of three bfloat16 numbers (3 x 8 significand bits), a float16 number of two (11 <= 2 x 8).
The terms are stacked below each other, so the kernel sees more rows of the same product and the weights are still read
and unpacked once; the partial results are summed in float32. Nothing is lost: each product bfloat16 x code is exact.
"""

import jax.numpy as jnp
from jax import Array, lax

TERMS = {"bfloat16": 1, "float16": 2, "float32": 3}


def bf16_terms(x: Array) -> Array:
    """x `[M, K]` as bfloat16 `[terms * M, K]`, largest terms first. Raises ValueError for another dtype.

    The first term carries an infinity or a NaN alone, so that `inf - inf` does not turn an infinity into a NaN.
    """
    name = str(x.dtype)
    if name not in TERMS:
        raise ValueError(f"activations are bfloat16, float16 or float32, not {name}")
    terms, rest = [], x.astype(jnp.float32)
    for _ in range(TERMS[name]):
        # Not astype there and back: XLA may drop such a pair of conversions as excess precision, and the rest with it.
        term = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        terms.append(term.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isfinite(term), rest - term, 0.0)
    return jnp.concatenate(terms, axis=0)


def sum_terms(y: Array, rows: int) -> Array:
    """`[terms * rows, N]` float32 -> `[rows, N]`, smallest terms first."""
    terms = y.reshape(-1, rows, y.shape[-1])
    total = terms[-1]
    for i in range(terms.shape[0] - 2, -1, -1):
        total = total + terms[i]
    return total
