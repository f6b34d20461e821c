"""The Cholesky factor that is a loop: the factor, its error, and the size of its program."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_layers import correlated_inputs

from lq.quantizers.cholesky import blocked_cholesky, cholesky

pytestmark = pytest.mark.once

EPS = 2.0**-24


def moment(channels):
    inputs = correlated_inputs(2 * channels, channels, spread=1.5).astype(np.float64)
    return (inputs.T @ inputs + 0.01 * np.square(inputs).sum() / channels * np.eye(channels)).astype(np.float32)


@pytest.mark.parametrize("function", [cholesky, blocked_cholesky])
@pytest.mark.parametrize("channels", [3, 128, 300, 512])
def test_is_the_factor(function, channels):
    matrix = moment(channels)
    lower = np.asarray(jax.jit(function)(jnp.asarray(matrix)), np.float64)
    assert (lower == np.tril(lower)).all()
    assert (np.diag(lower) > 0).all()
    size = np.sqrt(np.diag(matrix).astype(np.float64))
    # Higham, Accuracy and Stability, theorem 10.3. Of blocks, theorem 13.6: the solves and the products with K more.
    bound = (2 * channels + 2) * EPS * np.outer(size, size)
    assert (np.abs(lower @ lower.T - matrix) <= bound).all()


@pytest.mark.parametrize("function", [cholesky, blocked_cholesky])
@pytest.mark.parametrize("at", [0, 200, 299])
def test_only_the_lower_triangle_is_read(function, at):
    matrix = moment(300)
    spoilt = np.tril(matrix) + np.triu(np.full((300, 300), np.nan, np.float32), 1)
    np.testing.assert_array_equal(function(jnp.asarray(spoilt)), function(jnp.asarray(matrix)))
    matrix[at, at] = -1.0
    assert np.isnan(function(jnp.asarray(matrix))).any()


def test_the_loops_program_does_not_grow():
    def operations(channels):
        lowered = jax.jit(blocked_cholesky).lower(jax.ShapeDtypeStruct((channels, channels), jnp.float32))
        return Counter(re.findall(r"= \"?([\w.]+)", lowered.as_text()))

    assert operations(512) == operations(8192)
