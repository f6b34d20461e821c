"""`InputStats`: sums over tokens, which add up over batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq.calibration.statistics import SAMPLE_ROWS, reduce_inputs

FIELDS = frozenset({"hessian", "total", "absolute", "sample"})
T, K = 1200, 24
X = (np.random.default_rng(0).standard_normal((T, K)) + 0.5).astype(np.float32)
WEIGHTS = np.random.default_rng(1).uniform(0, 2, T).astype(np.float32)


def close(got, want, magnitude):
    """Within the float32 rounding of a sum of T terms in whatever order, blocks of at least 8 at a time."""
    return (np.abs(np.asarray(got, np.float64) - want) <= (T / 8 + 8) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
@pytest.mark.parametrize("cut", [T, 500, 1])
def test_sums_over_batches_are_those_of_float64(weights, cut):
    w = np.ones(T) if weights is None else weights.astype(np.float64)
    reduce = jax.jit(lambda x, weights: reduce_inputs(x, FIELDS, weights))
    first = reduce(jnp.asarray(X[:cut]), None if weights is None else jnp.asarray(weights[:cut]))
    stats = first
    if cut < T:
        stats = first + reduce(jnp.asarray(X[cut:]), None if weights is None else jnp.asarray(weights[cut:]))
    x, magnitude = X.astype(np.float64), np.abs(X).astype(np.float64)
    assert close(stats.tokens, w.sum(), w.sum())
    assert close(stats.hessian, (x * w[:, None]).T @ x, (magnitude * w[:, None]).T @ magnitude)
    assert close(stats.total, w @ x, w @ magnitude)
    assert close(stats.absolute, w @ magnitude, w @ magnitude)
    assert close(stats.mean, w @ x / w.sum(), 2 * (w @ magnitude) / w.sum())
    assert close(stats.mean_absolute, w @ magnitude / w.sum(), 2 * (w @ magnitude) / w.sum())


def test_the_sample_is_some_of_the_tokens_and_grows():
    first, second = (reduce_inputs(jnp.asarray(part), FIELDS) for part in (X, X[:100]))
    assert first.sample.shape[0] <= SAMPLE_ROWS
    np.testing.assert_array_equal(first.sample, X[::3])  # 1200 / 512, rounded up
    np.testing.assert_array_equal((first + second).sample, np.concatenate([X[::3], X[:100]]))


def test_only_what_is_needed_is_kept():
    stats = reduce_inputs(jnp.asarray(X), frozenset({"absolute"}))
    assert stats.hessian is stats.total is stats.sample is None
    for mean, name in (("mean", "total"), ("mean_absolute", "absolute")):
        other = reduce_inputs(jnp.asarray(X), FIELDS - {name})
        with pytest.raises(ValueError, match=f"these statistics have no {name}: name it among what is needed"):
            getattr(other, mean)


def test_an_expert_without_tokens_has_mean_zero():
    stats = reduce_inputs(jnp.asarray(X), FIELDS, jnp.zeros(T))
    assert (stats.mean == 0).all()
    assert (stats.mean_absolute == 0).all()
