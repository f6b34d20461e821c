"""Shares in the loss of the quantized model: they add up to it, and one step is the gradient half-way."""

import pytest
from perturbed_models import NAMES, OPTIONS, SCORED, WINDOWS, at, errors, gradients, slope, small_source

from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import METRICS, score
from lq.models.source import InMemory

pytestmark = pytest.mark.once


@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_shares_add_up_to_the_change(loss):
    """Completeness. The midpoint rule's error falls with the square of the steps: sixteen times, where it is all."""
    source = small_source()
    reference = make_reference(source, WINDOWS, batch_size=2)
    changes = {}
    for bits, name in zip((3, 4), ("int3-g32", "int4-g32"), strict=True):
        point = InMemory(source.config, at(source, errors(source, bits)))
        lost, before = (evaluate(one, WINDOWS, reference=reference, batch_size=2) for one in (point, source))
        changes[name] = lost.kl if loss == "kl" else lost.nll - before.nll
    missing = {}
    for steps in (2, 8):
        got = score(source, "path_integral", WINDOWS, OPTIONS | {"bits": [3, 4], "steps": steps, "loss": loss})
        # Losses are of 8 nats, in float32: their difference is known to some 2^-24 of that.
        assert got.extra["measured"] == pytest.approx(changes, rel=1e-4, abs=2e-6)
        for name, change in changes.items():
            shares = [costs[name] for costs in got.costs.values()]
            assert got.extra["attributed"][name] == pytest.approx(sum(shares), rel=1e-12)
            missing[steps, name] = abs(sum(shares) - change)
            assert missing[steps, name] < (0.05 if steps == 2 else 0.005) * sum(map(abs, shares))
        assert got.passes == 1 + 2 * (4 * steps + 1), "the reference, or the loss of the original"
    for name in changes if loss == "kl" else ():  # the change of nll passes through zero, and so does what is missing
        assert missing[8, name] < missing[2, name] / 4


def test_one_step_is_the_gradient_half_way():
    source, error = small_source(), errors(small_source(), 2)
    got = score(source, "path_integral", WINDOWS, OPTIONS | {"steps": 1})
    windows = gradients(source, at(source, error, 0.5), "kl")
    expected = {path: sum(slope(window, error)[path] for window in windows) / SCORED for path in error}
    largest = max(map(abs, expected.values()))
    # Float32, see test_delta_loss.
    assert {path: costs[NAMES[0]] for path, costs in got.costs.items()} == pytest.approx(
        expected, rel=1e-3, abs=1e-4 * largest
    )


def test_no_step_is_none():
    with pytest.raises(UserError, match=r"^steps: 0; write 1 or more$"):
        METRICS.options("path_integral", {"steps": 0})
