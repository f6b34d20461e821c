"""Fisher information: the formula in float64, and drawn labels against the information itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from perturbed_models import BITS, NAMES, OPTIONS, SCORED, WINDOWS, errors, gradients, small_source
from random_models import TOKENS, random_model
from whole_model import in_float64, kernels_of, with_kernels

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.backward import Backward
from lq.importance.perturbations import squared_slopes
from lq.models.decoder import Decoder
from lq.models.source import InMemory

pytestmark = pytest.mark.once


def test_squared_gradients_of_windows_times_squared_errors():
    source = small_source()
    windows = gradients(source, source.params())
    got = score(source, "fisher", WINDOWS, OPTIONS)
    for bits, name in zip(BITS, NAMES, strict=True):
        for path, error in errors(source, bits).items():
            expected = sum((window[path] ** 2 * error**2).sum() for window in windows) / (2 * SCORED)
            # Gradients through two blocks in float32: 1e-5 of their size, and squared.
            assert got.costs[path][name] == pytest.approx(expected, rel=1e-4)
    for path, of_matrix in got.costs.items():
        assert got.values[path] == of_matrix[NAMES[0]] - of_matrix[NAMES[-1]]
    assert got.passes == 4


def test_a_unit_loses_what_its_matrices_lose():
    source = small_source()
    one, other = (score(source, "fisher", WINDOWS, OPTIONS | {"unit": unit}) for unit in ("matrix", "block"))
    for index in range(2):
        mine = sum(value for path, value in one.values.items() if path.startswith(f"block_{index}/"))
        assert other.values[f"block_{index}"] == pytest.approx(mine, rel=1e-12)


def test_drawn_labels_give_the_information_itself():
    """E over labels of (sum_t g_t)^2 = sum_t sum_v p_v (d ln p_v / dW)^2: terms of different positions fall out."""
    config, params = random_model("llama, untied")
    path, tokens = "block_1/attention/k_proj", TOKENS[:1, :6]
    with jax.enable_x64(True):
        params64 = in_float64(params)
        kernels = kernels_of(config, params64)

        def log_p(kernel):
            logits = Decoder(config).apply({"params": with_kernels(params64, kernels | {path: kernel})}, tokens)
            return jax.nn.log_softmax(logits[0, :-1])

        p, slopes = jnp.exp(log_p(kernels[path])), jax.jit(jax.jacrev(log_p))(kernels[path])
        exact = float(jnp.einsum("tv,tvij->", p, jnp.square(slopes)))
    source = InMemory(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))
    ones = [
        {p.split("/", 1)[1]: np.ones((1, *w.shape), np.float32) for p, w in kernels.items() if p[6] == str(i)}
        for i in range(2)
    ]
    drawn = []
    for seed in range(200):
        backward = Backward(source, Windows(tokens, "random", "random"), loss="sampled", seed=seed)
        found = backward.gradients(source, squared_slopes, ones.__getitem__)
        drawn.append(found.blocks[1]["attention/k_proj"].item())
    assert np.mean(drawn) == pytest.approx(exact, abs=4 * np.std(drawn) / np.sqrt(len(drawn)))
    assert np.std(drawn) / np.sqrt(len(drawn)) < 0.2 * exact, "or this says nothing"


def test_labels_and_seeds():
    source = small_source(1)
    data, first, again, second = (
        score(source, "fisher", WINDOWS, OPTIONS | more).values
        for more in ({}, *({"labels": "model", "seed": seed} for seed in (0, 0, 1)))
    )
    assert first == again
    assert len({tuple(values.values()) for values in (data, first, second)}) == 3


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_that_are_none(seed):
    with pytest.raises(UserError, match=rf"^seed: {seed}; write a whole number from 0 to 4294967295$"):
        METRICS.options("fisher", {"seed": seed})
