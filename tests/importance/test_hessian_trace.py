"""Traces: Hutchinson's estimate on quadratic losses, and on a model against differences of gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from perturbed_models import BITS, NAMES, OPTIONS, WINDOWS, errors, small_source
from random_models import TOKENS, random_model
from whole_model import in_float64, kernels_of, whole_gradients, with_kernels

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.hessian_trace import curvatures, random_signs, traces
from lq.models.decoder import Decoder
from lq.models.matrices import matrices
from lq.models.source import InMemory

pytestmark = pytest.mark.once


def quadratic(A):
    """1/2 x^T A x of the arrays a, b, all their numbers in a row."""
    return lambda x: 0.5 * jnp.concatenate([x["a"].ravel(), x["b"].ravel()]) @ A @ jnp.concatenate(
        [x["a"].ravel(), x["b"].ravel()]
    )  # fmt: skip


AT = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}


def test_a_probe_of_a_diagonal_hessian_is_exact():
    diagonal = np.arange(10.0, dtype=np.float32) - 3
    for seed in range(5):
        found = curvatures(quadratic(np.diag(diagonal)), AT, random_signs(jax.random.key(seed), AT))
        assert found == {"a": diagonal[:6].sum(), "b": diagonal[6:].sum()}


def test_probes_are_right_on_average_for_each_of_several_arrays():
    """Variance of a probe: 2 sum_{i != j} A_ij^2 within an array, sum A_ij^2 of its rows in the others."""
    rng, probes = np.random.default_rng(0), 4000
    A = rng.standard_normal((10, 10)).astype(np.float32)
    A += A.T
    keys = jax.random.split(jax.random.key(0), probes)
    found = jax.vmap(lambda key: curvatures(quadratic(A), AT, random_signs(key, AT)))(keys)
    for name, mine in (("a", slice(0, 6)), ("b", slice(6, 10))):
        own, rows = A[mine, mine].astype(np.float64), np.delete(A[mine].astype(np.float64), np.arange(10)[mine], 1)
        variance = 2 * (np.square(own).sum() - np.square(np.diag(own)).sum()) + np.square(rows).sum()
        assert np.mean(found[name]) == pytest.approx(np.trace(own), abs=4 * math.sqrt(variance / probes))
        assert np.var(found[name]) == pytest.approx(variance, rel=0.2)


@pytest.mark.long
@pytest.mark.parametrize(("case", "loss"), [("llama, tied", "nll"), ("mixtral, untied", "kl")])
def test_a_probe_is_the_difference_of_gradients_along_it(case, loss):
    """Central differences in float64, along some ten thousand signs: a step of 1e-6 moves by 1e-4 in all.

    The third derivative leaves the square of it, rounding 2^-53 over the step.
    """
    config, params = random_model(case)
    with jax.enable_x64(True):
        point = in_float64(params)
        windows = Windows(TOKENS, "random", "random")
        got = traces(InMemory(config, point), windows, loss=loss, probes=2, seed=3, batch_size=1, dtype=jnp.float64)
        kernels = kernels_of(config, point)
        signs = random_signs(jax.random.fold_in(jax.random.key(3), 1), kernels)
        signs = {path: np.asarray(sign) for path, sign in signs.items()}
    step, kernels = 1e-6, {path: np.asarray(w) for path, w in kernels.items()}
    original = params if loss == "kl" else None
    ahead, behind = (
        whole_gradients(
            config, with_kernels(params, {p: w + sign * step * signs[p] for p, w in kernels.items()}), TOKENS, original
        )
        for sign in (1, -1)
    )
    expected = {}
    for path, v in signs.items():
        change = sum(a[path] for a in ahead) - sum(b[path] for b in behind)
        expected[path] = (v * change).sum() / (2 * step) / (TOKENS.size - len(TOKENS))
    largest = max(map(abs, expected.values()))
    assert {path: found[1] for path, found in got.items()} == pytest.approx(expected, rel=1e-6, abs=1e-7 * largest)


@pytest.mark.long
def test_the_curvature_of_the_divergence_is_the_information():
    """v^T F v = sum over positions of the variance under p of v . d ln p / dW, which is never negative."""
    config, params = random_model("llama, untied")
    with jax.enable_x64(True):
        point = in_float64(params)
        windows = Windows(TOKENS, "random", "random")
        got = traces(InMemory(config, point), windows, loss="kl", probes=1, batch_size=2, dtype=jnp.float64)
        kernels = kernels_of(config, point)
        signs = random_signs(jax.random.fold_in(jax.random.key(0), 0), kernels)

        def log_p(kernels):
            return jax.nn.log_softmax(Decoder(config).apply({"params": with_kernels(point, kernels)}, TOKENS)[:, :-1])

        value, change = jax.jvp(log_p, (kernels,), (signs,))
        whole = (jnp.exp(value) * change**2).sum() / (TOKENS.size - len(TOKENS))
    assert sum(found.item() for found in got.values()) == pytest.approx(float(whole), rel=1e-9)


def test_costs_are_the_mean_curvature_times_the_squared_error():
    source = small_source()
    got = score(source, "hessian_trace", WINDOWS, OPTIONS | {"probes": 3})
    probed = traces(source, WINDOWS, probes=3, batch_size=2)
    for path, shape in matrices(source.config).items():
        trace = got.extra["trace"][path]
        assert trace == np.mean(probed[path])
        assert got.extra["standard_error"][path] == pytest.approx(np.std(probed[path], ddof=1) / math.sqrt(3))
        for bits, name in zip(BITS, NAMES, strict=True):
            squared = np.square(errors(source, bits)[path]).sum()
            assert got.costs[path][name] == pytest.approx(0.5 * trace / math.prod(shape) * squared, rel=1e-5)
    assert got.passes == 18


@pytest.mark.parametrize(
    ("options", "line"),
    [({"probes": 0}, "probes: 0; write 1 or more"), ({"seed": -1}, "seed: -1; write a whole number from 0 to 42949")],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(UserError) as refused:
        METRICS.options("hessian_trace", options)
    assert str(refused.value).startswith(line)
