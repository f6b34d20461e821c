"""Agreement of scores: scipy's correlation, hand-made orders, and intervals whose coverage is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.agreement import agreement, common, parts_of, spearman
from lq.importance.scores import Scores

pytestmark = pytest.mark.once


def scores(values, metric="lim"):
    named = {f"block_{i}": float(value) for i, value in enumerate(values)}
    return Scores(metric=metric, values=named, model="m", shapes={}, other_weights=0)


def test_spearman_is_scipys_with_ties_too():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 24).astype(float), rng.standard_normal(24)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-14)
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_common_units_of_hand_made_orders():
    a, b = np.array([9.0, 8, 7, 0, 0, 0]), np.array([0.0, 8, 9, 7, 0, 0])
    assert [common(a, b, top) for top in (1, 2, 3, 6)] == [0, 1, 2, 6]
    assert common(np.zeros(4), np.zeros(4), 2) == 2, "of equals the earlier, in both"


def test_a_score_agrees_with_itself_and_not_with_its_reverse():
    forth = scores(np.arange(16.0))
    same, other = agreement(forth, forth), agreement(forth, scores(-np.arange(16.0)))
    assert (same.spearman, same.common, same.top) == (pytest.approx(1), 4, 4)
    assert (other.spearman, other.common) == (pytest.approx(-1), 0)
    assert same.spearman_interval is None


def test_intervals_cover_what_other_text_would_have_given():
    """Scores of parts are a truth with noise; in 100 worlds the interval holds the whole text's own spread.

    The mean over all parts of one world and the truth differ by the noise of a mean; percentiles of 12 draws cover a
    little less than 95 %. Fewer than 80 of 100 has probability 1e-4 even at 90 %.
    """
    rng, held = np.random.default_rng(1), 0
    truth, other = np.arange(12.0), rng.permutation(12).astype(float)
    expected = spearman(truth, other)
    for world in range(100):
        parts = [scores(truth + 3 * rng.standard_normal(12)) for _ in range(12)]
        whole = scores(np.mean([list(part.values.values()) for part in parts], axis=0))
        found = agreement(whole, scores(other, "zd"), (parts, [scores(other, "zd")]), seed=world)
        low, high = found.spearman_interval
        assert low <= found.spearman <= high
        held += low <= expected <= high
    assert held >= 80


def test_without_noise_an_interval_is_a_point():
    a, b = scores(np.arange(8.0)), scores([0, 2, 1, 3, 4, 6, 5, 7], "zd")
    found = agreement(a, b, ([a] * 5, [b]))
    assert found.spearman_interval == (found.spearman, found.spearman)
    assert found.common_interval == (found.common, found.common)


def test_parts_of_a_text_are_all_of_it():
    windows = Windows(np.arange(14, dtype=np.int32).reshape(7, 2), "text", "cut")
    cut = parts_of(windows, 3)
    assert [len(part.tokens) for part in cut] == [3, 2, 2]
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in cut]), windows.tokens)
    with pytest.raises(UserError, match="parts: 8 of 7 windows; write fewer"):
        parts_of(windows, 8)


def test_what_cannot_be_compared():
    a, b = scores(np.arange(4.0)), scores(np.arange(5.0), "zd")
    with pytest.raises(UserError, match="scores lim and zd: of different units"):
        agreement(a, b)
    with pytest.raises(UserError, match="top: 5 of 4 units; write 1 to 4"):
        agreement(a, a, top=5)
