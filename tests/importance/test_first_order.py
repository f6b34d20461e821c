"""The first-order term at the original: the formula in float64."""

import numpy as np
import pytest
from perturbed_models import BITS, NAMES, OPTIONS, SCORED, WINDOWS, errors, gradients, slope, small_source

from lq.importance import score

pytestmark = pytest.mark.once


def test_the_gradient_times_the_error_without_its_sign():
    source = small_source()
    windows = gradients(source, source.params())
    got = score(source, "first_order", WINDOWS, OPTIONS)
    signs = set()
    for bits, name in zip(BITS, NAMES, strict=True):
        error = errors(source, bits)
        found = {path: sum(slope(window, error)[path] for window in windows) / SCORED for path in error}
        for path, expected in found.items():
            size = sum(np.linalg.norm(window[path] * error[path]) for window in windows) / SCORED
            assert got.costs[path][name] == pytest.approx(abs(expected), abs=1e-4 * size)
            signs.add(np.sign(expected))
    assert signs == {-1.0, 1.0}, "or the sign is not looked at"
    assert got.passes == 4
