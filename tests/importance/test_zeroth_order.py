"""Zeroth-order slopes: linear losses, gradients of the model in float64, and noise that can be drawn again."""

import math

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.noise import noise_keys, with_noise
from lq.importance.units import units_of
from lq.importance.zeroth_order import slope
from lq.models.decoder import Decoder
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.quantizers.apply import read_matrix

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 16), np.int32), "random", "random")
BLOCKS = 3


@pytest.fixture(scope="module")
def source():
    config = llama_config(BLOCKS)
    return InMemory(config, random_params(config, dtype=jnp.float32))


def drawn(weight, key, probe):
    """z, float64."""
    return np.asarray(with_noise(0 * weight, key, probe, 1.0), np.float64)


def test_a_linear_loss_is_as_steep_as_its_gradient_is_long():
    rng = np.random.default_rng(0)
    gradient = {name: rng.standard_normal((6, 5)) for name in "ab"}
    weights = {name: jnp.zeros((6, 5)) for name in "ab"}
    keys = {name: jax.random.fold_in(jax.random.key(3), i) for i, name in enumerate("ab")}
    length = math.sqrt(sum((g * g).sum() for g in gradient.values()))

    def loss(at):
        return sum((gradient[name] * np.asarray(at[name], np.float64)).sum() for name in at)

    found = [slope(loss, weights, keys, probe, 1e-3) for probe in range(400)]
    for probe in range(3):
        along = sum((gradient[name] * drawn(weights[name], keys[name], probe)).sum() for name in "ab")
        assert found[probe] == pytest.approx(abs(along), rel=1e-5), "eps z is rounded to float32"
    # |N(0, 1)| has a mean of sqrt(2/pi) and a variance of 1 - 2/pi: four standard errors of 400.
    expected, error = length * math.sqrt(2 / math.pi), length * math.sqrt((1 - 2 / math.pi) / 400)
    assert np.mean(found) == pytest.approx(expected, abs=4 * error)


def test_noise_is_known_from_its_key(source):
    keys = noise_keys(source.config, 0)
    weight = jnp.ones((64, 64))
    paths = list(keys)
    assert paths == list(matrices(source.config))
    again = noise_keys(source.config, 0)
    one = drawn(weight, keys[paths[0]], 0)
    np.testing.assert_array_equal(one, drawn(weight, again[paths[0]], 0))
    others = [drawn(weight, keys[paths[1]], 0), drawn(weight, keys[paths[0]], 1)]
    others.append(drawn(weight, noise_keys(source.config, 1)[paths[0]], 0))
    for other in others:
        # Of 4096 independent pairs: four standard errors.
        assert abs((one * other).mean()) < 4 / 64
    assert one.mean() == pytest.approx(0.0, abs=4 / 64)
    assert one.var() == pytest.approx(1.0, abs=4 * math.sqrt(2) / 64)


def gradients(source):
    """Of the mean negative log-likelihood in every matrix, by path: automatic differentiation in float64."""

    def loss(params):
        log_p = jax.nn.log_softmax(Decoder(source.config).apply({"params": params}, WINDOWS.tokens))
        return -jnp.take_along_axis(log_p[:, :-1], WINDOWS.tokens[:, 1:, None], -1).mean()

    with jax.enable_x64(True):
        found = jax.grad(loss)(by_hand.wide(source.params()))
        return {path: np.asarray(read_matrix(found[path.split("/")[0]], path)) for path in matrices(source.config)}


@pytest.mark.parametrize("unit", ["block", "part"])
def test_slopes_are_those_of_the_gradient(source, unit):
    probes, gradient = 3, gradients(source)
    found = score(source, "zeroth_order", WINDOWS, {"unit": unit, "probes": probes, "seed": 5, "batch_size": 2})
    keys = noise_keys(source.config, 5)
    for name, paths in units_of(source.config, unit).items():
        along = [sum((gradient[p] * drawn(gradient[p], keys[p], i)).sum() for p in paths) for i in range(probes)]
        # The loss of about 9 is a mean over 60 tokens of float32 logits, known to about 5e-7: its difference over 2 eps
        # to 5e-4. And eps is finite: the third derivative adds a part in a thousand or so.
        assert found.values[name] == pytest.approx(np.abs(along).mean(), abs=1e-3, rel=5e-3)


def test_by_the_root_of_the_number_of_weights(source):
    plain = score(source, "zeroth_order", WINDOWS, {"probes": 1}).values
    normalized = score(source, "zeroth_order", WINDOWS, {"probes": 1, "normalize": True}).values
    size = sum(math.prod(shape) for path, shape in matrices(source.config).items() if path.startswith("block_1/"))
    assert normalized["block_1"] == pytest.approx(plain["block_1"] / math.sqrt(size), rel=1e-12)


def test_what_it_took(source):
    """The model as it is, and two runs from each block on for every probe."""
    passes = score(source, "zeroth_order", WINDOWS, {"probes": 2}).passes
    assert passes == pytest.approx(1 + 2 * 2 * (1 + 2 / 3 + 1 / 3))


@pytest.mark.parametrize("which", range(BLOCKS))
def test_a_block_that_is_steeper_is_first(source, which):
    """Gains of norms times 8 and the weights that read from them over 8 compute the same, and are 8 times as steep."""

    def steeper(index, block):
        if index != which:
            return block
        new = {**block, **{norm: {"scale": 8 * block[norm]["scale"]} for norm in ("attention_norm", "mlp_norm")}}
        for part, names in (("attention", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            new[part] = {**block[part], **{name: {"kernel": block[part][name]["kernel"] / 8} for name in names}}
        return new

    options = {"eps": 2e-4, "unit": "part"}
    changed, original = (
        score(one, "zeroth_order", WINDOWS, options) for one in (by_hand.with_blocks(source, steeper), source)
    )
    assert {unit.split("/")[0] for unit in changed.ranking()[:2]} == {f"block_{which}"}
    for unit, value in original.values.items():
        if not unit.startswith(f"block_{which}"):
            # Powers of two: the very same functions, but for the order of sums. 5e-7 of the loss over 2 eps.
            assert changed.values[unit] == pytest.approx(value, abs=5e-3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"eps": 0}, "eps: 0; write a number above 0, such as 0.001"),
        ({"eps": float("nan")}, "eps: nan; write a number above 0"),
        ({"probes": 0}, "probes: 0; write 1 or more"),
        ({"seed": -1}, "seed: -1; write 0 or more"),
    ],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(UserError) as refused:
        METRICS.options("zeroth_order", options)
    assert str(refused.value).startswith(line)
