"""Statistics of inputs: reductions of single tokens, and of sets of tokens put together."""

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.statistics import InputStats, reduce_inputs

EVERY = frozenset({"hessian", "total", "absolute", "peak", "sample"})
X = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)


def test_each_field_is_what_it_says():
    x = X.astype(np.float64)
    stats = jax.jit(reduce_inputs, static_argnames=("needs", "rows"))(jnp.asarray(X), EVERY, rows=10)
    assert float(stats.tokens) == 30
    want = {"hessian": x.T @ x, "total": x.sum(0), "absolute": np.abs(x).sum(0), "peak": np.abs(x).max(0)}
    for field, value in want.items():  # sums of 30 float32 products
        np.testing.assert_allclose(getattr(stats, field), value, rtol=1e-5, atol=30 * 2.0**-23)
    np.testing.assert_array_equal(stats.sample, X[::3])
    np.testing.assert_allclose(stats.mean, x.mean(0), atol=2.0**-20)
    np.testing.assert_allclose(stats.mean_absolute, np.abs(x).mean(0), atol=2.0**-20)


def test_fields_that_are_not_needed_are_none():
    stats = reduce_inputs(jnp.asarray(X), frozenset({"peak"}))
    assert [stats.hessian, stats.total, stats.absolute, stats.sample] == [None] * 4
    assert (stats + stats).hessian is None


def test_two_sets_of_tokens_add_up_and_their_peak_is_the_larger():
    whole, parts = (reduce_inputs(jnp.asarray(x), EVERY) for x in (X, X[:8])), X[8:]
    whole, first, second = *whole, reduce_inputs(jnp.asarray(parts), EVERY)
    both = first + second
    assert isinstance(both, InputStats)
    for field in ("tokens", "hessian", "total", "absolute"):
        np.testing.assert_allclose(getattr(both, field), getattr(whole, field), rtol=1e-5, atol=30 * 2.0**-23)
    np.testing.assert_array_equal(both.peak, whole.peak)
    assert (np.asarray(both.peak) < np.asarray(first.peak) + np.asarray(second.peak)).all()
    np.testing.assert_array_equal(both.sample, X)


def test_weights_of_zero_and_one_choose_tokens():
    weights = jnp.asarray(np.arange(30) % 3 == 0, jnp.float32)
    needs = EVERY - {"sample"}
    chosen, subset = reduce_inputs(jnp.asarray(X), needs, weights), reduce_inputs(jnp.asarray(X[::3]), needs)
    for a, b in zip(jax.tree.leaves(chosen), jax.tree.leaves(subset), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=10 * 2.0**-23)
    none = reduce_inputs(jnp.asarray(X), needs, jnp.zeros(30))
    np.testing.assert_array_equal(none.peak, np.zeros(5))
