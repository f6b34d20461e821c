"""The gradient at the quantized model: the formula in float64 for every choice, and what it predicts."""

import numpy as np
import pytest
from perturbed_models import BITS, NAMES, OPTIONS, SCORED, WINDOWS, at, errors, gradients, small_source

from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import METRICS, score
from lq.models.source import InMemory

pytestmark = pytest.mark.once


def expected_costs(source, loss, where, form) -> dict[str, list[float]]:
    found = {}
    quantized = {bits: errors(source, bits) for bits in BITS}
    points = {bits: gradients(source, at(source, quantized[bits]), loss) for bits in BITS}
    for path in quantized[BITS[0]]:
        found[path] = []
        for bits in BITS:
            taken = {"low": BITS[:1], "ends": BITS, "each": (bits,)}[where]
            products = [[w[path] * quantized[bits][path] for w in points[one]] for one in taken]
            if form == "absolute":
                products = [[np.abs(product) for product in windows] for windows in products]
            found[path].append(np.mean([np.sum(windows) for windows in products]) / SCORED)
    return found


@pytest.mark.parametrize(("loss", "where", "form"), [
    ("kl", "low", "signed"),
    ("kl", "ends", "signed"),
    ("nll", "each", "absolute"),
    ("nll", "ends", "absolute"),
])  # fmt: skip
def test_costs_are_those_of_float64(loss, where, form):
    source = small_source()
    got = score(source, "delta_loss", WINDOWS, OPTIONS | {"loss": loss, "at": where, "form": form})
    expected = expected_costs(source, loss, where, form)
    largest = max(abs(cost) for costs in expected.values() for cost in costs)
    for path, costs in expected.items():
        # Signed sums of some thousand float32 terms: small ones are known no better than to the size of what cancels.
        assert [got.costs[path][name] for name in NAMES] == pytest.approx(costs, rel=1e-3, abs=1e-4 * largest), path
    backwards = {"low": 1, "ends": 2, "each": len(BITS)}[where]
    assert got.passes == (loss == "kl") + 4 * backwards


def test_the_trapezoid_tells_what_lies_between_low_and_high():
    """From 4 to 6 bits the divergence is nearly quadratic: the scores add up to what is measured within a tenth."""
    source = small_source()
    reference = make_reference(source, WINDOWS, batch_size=2)
    points = [InMemory(source.config, at(source, errors(source, bits))) for bits in (4, 6)]
    low, high = (evaluate(point, WINDOWS, reference=reference, batch_size=2).kl for point in points)
    given = OPTIONS | {"bits": [4, 6]}
    got = score(source, "delta_loss", WINDOWS, given | {"at": "ends"})
    assert sum(got.values.values()) == pytest.approx(low - high, rel=0.1)
    one_end = score(source, "delta_loss", WINDOWS, given)
    assert sum(one_end.values.values()) > 1.5 * (low - high), "a tangent of a parabola, from its steep end"


def test_one_option_is_priced_against_the_original():
    source = small_source(1)
    got = score(source, "delta_loss", WINDOWS, OPTIONS | {"bits": [2]})
    assert got.values == {path: costs["int2-g32"] for path, costs in got.costs.items()}
    assert sum(got.values.values()) > 0


@pytest.mark.parametrize(("option", "value"), [("at", "high"), ("loss", "mse"), ("form", "squared")])
def test_choices_that_there_are_not(option, value):
    with pytest.raises(UserError, match=f"^metric delta_loss: option {option}: '{value}' is not one of "):
        METRICS.options("delta_loss", {option: value})
