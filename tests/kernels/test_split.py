"""float32 and float16 as sums of bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq_kernels.split import TERMS, bf16_terms, sum_terms


@pytest.mark.parametrize("dtype", list(TERMS))
def test_the_terms_add_up_to_the_number_exactly(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((16, 64)) * 10.0 ** rng.integers(-3, 4, (16, 64))
    x = jnp.asarray(values, dtype)
    terms = np.asarray(jax.jit(bf16_terms)(x)).astype(np.float64).reshape(TERMS[dtype], 16, 64)
    np.testing.assert_array_equal(terms.sum(0), np.asarray(x).astype(np.float64))


def test_infinity_and_nan_are_carried_by_the_first_term_alone():
    x = jnp.asarray([[np.inf, -np.inf, np.nan, 1.1]], jnp.float32)
    terms = np.asarray(bf16_terms(x)).astype(np.float32)
    np.testing.assert_array_equal(terms[0, :3], [np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(terms[1:, :3], 0)


def test_partial_results_are_summed():
    y = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(sum_terms(y, 2), np.arange(12.0).reshape(3, 2, 2).sum(0))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="bfloat16, float16 or float32, not float64"):
        bf16_terms(np.ones((1, 1)))
