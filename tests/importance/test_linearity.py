"""Linearity coefficients: quadratic losses, float64 with the same noise, and costs that add up."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.linearity import energy, relative_error, slope
from lq.importance.noise import noise_keys, with_noise
from lq.importance.units import units_of
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.quantizers.apply import read_matrix, with_matrix

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 16), np.int32), "random", "random")
FORMAT = {"bits": [4, 2], "group_size": 32, "batch_size": 2}
BLOCKS = 2


@pytest.fixture(scope="module")
def source():
    config = llama_config(BLOCKS)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.fixture(scope="module")
def found(source):
    return score(source, "linearity", WINDOWS, FORMAT)


def test_the_slope_of_a_line():
    squares = np.array([0.01, 0.04, 0.09])
    assert slope(squares, 7.0 * squares) == pytest.approx(7.0, rel=1e-12)
    losses = np.array([0.1, 0.2, 0.5])
    (expected,) = np.linalg.lstsq(squares[:, None], losses, rcond=None)[0]
    assert slope(squares, losses) == pytest.approx(expected, rel=1e-12)


def test_of_a_quadratic_loss_it_is_the_trace():
    """1/2 dW^T H dW at relative size t: on average t^2 tr(H) |W|^2 / (2 n)."""
    rng, draws, t = np.random.default_rng(0), 400, 0.1
    weight = rng.standard_normal((8, 6)).astype(np.float32)
    root = rng.standard_normal((48, 48))
    hessian = root @ root.T
    size = t * np.linalg.norm(weight) / np.sqrt(weight.size)
    losses = []
    for draw in range(draws):
        noisy = with_noise(jnp.asarray(weight), jax.random.key(1), draw, size)
        step = (np.asarray(noisy, np.float64) - weight).ravel()
        losses.append(0.5 * step @ hessian @ step)
    expected = np.trace(hessian) * np.square(weight).sum() / (2 * weight.size)
    # z^T H z has a variance of 2 |H|^2: four standard errors.
    error = np.sqrt(2 / draws) * np.linalg.norm(hessian) / np.trace(hessian)
    assert slope(np.array([t * t]), np.array([np.mean(losses)])) == pytest.approx(expected, rel=4 * error)


def test_relative_errors_are_those_of_the_quantizer(source, found):
    for bits in (2, 4):
        spec = QuantSpec(bits=bits, group_size=32)
        model = PlannedSource(source, dict.fromkeys(matrices(source.config), spec), Recipe())
        for path in matrices(source.config):
            index = int(path.split("/")[0].removeprefix("block_"))
            original = np.asarray(read_matrix(source.block(index), path), np.float64)
            rounded = np.asarray(read_matrix(model.block(index), path).dequantize(), np.float64)
            expected = np.square(rounded - original).sum() / np.square(original).sum()
            # Sums of 64 or 128 squares in float32.
            assert found.extra["relative_error"][path][str(spec)] == pytest.approx(expected, rel=128 * 2.0**-24)
    assert relative_error(jnp.zeros((4, 4)), jnp.zeros((4, 4))) == 0.0
    assert energy(jnp.full((2, 3, 4), 2.0)) == 96.0


def test_coefficients_are_those_of_float64(source, found):
    levels = np.array([0.05, 0.1, 0.15])
    keys, h = noise_keys(source.config, 0), by_hand.states(source, WINDOWS.tokens)
    log_p = by_hand.log_probabilities(source, h[-1])[:, :-1]
    for path in ("block_0/attention/v_proj", "block_0/mlp/down_proj", "block_1/mlp/up_proj"):
        index = int(path.split("/")[0].removeprefix("block_"))
        weight = read_matrix(source.block(index), path)
        losses = []
        for draw, t in enumerate(levels):
            noise = np.asarray(with_noise(0 * weight, keys[path], draw, 1.0), np.float64)
            original = np.asarray(weight, np.float64)
            noisy = original + t * np.linalg.norm(original) / np.sqrt(weight.size) * noise
            block = with_matrix(jax.tree.map(np.asarray, source.block(index)), path, noisy)
            last = by_hand.rest(
                source, WINDOWS.tokens, index + 1, by_hand.block_output(source, WINDOWS.tokens, index, block, h[index])
            )
            losses.append(by_hand.kl(log_p, by_hand.log_probabilities(source, last)[:, :-1]).mean())
        (expected,) = np.linalg.lstsq(np.square(levels)[:, None], np.array(losses), rcond=None)[0]
        # A KL of two softmaxes of logits that float32 knows to 5e-5 is off by 1e-6 or so: its error is of their squares
        # and cross terms, since sum of p (log p - log q) is 0 to first order.
        assert found.extra["coefficient"][path] == pytest.approx(expected, rel=1e-3)


def test_costs_add_up_over_a_unit(source, found):
    """And the noise of a matrix is its own, whatever the units are."""
    for unit in ("group", "block"):
        other = score(source, "linearity", WINDOWS, {**FORMAT, "unit": unit})
        assert other.extra == found.extra
        for name, paths in units_of(source.config, unit).items():
            for spec in ("int2-g32", "int4-g32"):
                assert other.costs[name][spec] == pytest.approx(sum(found.costs[p][spec] for p in paths), rel=1e-12)
            assert other.values[name] == other.costs[name]["int2-g32"]
    for path, of_options in found.costs.items():
        for spec, cost in of_options.items():
            product = found.extra["coefficient"][path] * found.extra["relative_error"][path][spec]
            assert cost == pytest.approx(product, rel=1e-12)


def test_it_foretells_what_is_measured(source, found):
    """At four bits, on an untrained model: the sum to a third, the order nearly. What the theorem claims."""
    measured = score(source, "kl", WINDOWS, FORMAT)
    foretold = np.array([found.costs[path]["int4-g32"] for path in found.values])
    true = np.array([measured.costs[path]["int4-g32"] for path in found.values])
    assert foretold.sum() == pytest.approx(true.sum(), rel=1 / 3)
    assert np.corrcoef(np.argsort(np.argsort(foretold)), np.argsort(np.argsort(true)))[0, 1] > 0.8


def test_what_it_took(found):
    """The reference, the model as it is, and from each block on seven matrices at three sizes of noise."""
    assert found.passes == pytest.approx(1 + 1 + 7 * 3 * (1 + 1 / 2))


@pytest.mark.parametrize("which", range(BLOCKS))
def test_a_block_that_writes_more_is_first(source, which):
    """Before so quiet a block, that is: the stream behind the embedding is itself a tenth of what a block writes."""
    changed = by_hand.planted(source, which, quiet=0.001)
    found = score(changed, "linearity", WINDOWS, {**FORMAT, "unit": "block", "levels": [0.1]})
    assert found.ranking()[0] == f"block_{which}"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"levels": []}, "levels: []; write relative sizes of noise above 0, such as [0.05, 0.1]"),
        ({"levels": [0.1, 0]}, "levels: [0.1, 0]; write relative sizes"),
        ({"levels": ["a"]}, "levels: ['a']; write relative sizes"),
        ({"seed": -1}, "seed: -1; write 0 or more"),
        ({"bits": []}, "bits: []; write each width once"),
    ],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(UserError) as refused:
        METRICS.options("linearity", options)
    assert str(refused.value).startswith(line)
