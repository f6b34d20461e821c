"""Experts that saw too few tokens: what they lack comes from all experts, in every statistic and in channel scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import blocks_of, states

from lq.calibration.statistics import SAMPLE_ROWS, InputStats, reduce_inputs
from lq.calibration.taps import reduce_expert_inputs
from lq.models.matrices import block_matrices
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, Recipe
from lq.quantizers.awq import ScalingOptions
from lq.quantizers.awq_scaling import scale_block
from lq.quantizers.channel_lines import channel_lines
from lq.quantizers.experts import Shortage, fill_in
from lq.quantizers.line_inputs import line_statistics
from lq.quantizers.matrix import MeasuredInput
from lq.quantizers.smoothquant import SmoothQuantOptions, smooth_block

pytestmark = pytest.mark.once

EVERYTHING = frozenset({"hessian", "total", "absolute", "square", "peak", "sample"})
COUNTS = (0, 3, 100)  # tokens of three experts
K = 8
X = [np.random.default_rng(n).standard_normal((n, K)).astype(np.float32) for n in COUNTS]


def statistics(needs=EVERYTHING, weights=None) -> InputStats:
    weights = None if weights is None else jnp.asarray(weights)
    return reduce_expert_inputs(jnp.asarray(np.concatenate(X)), jnp.asarray(COUNTS), frozenset(needs), weights)


def test_sums_grow_by_as_many_average_tokens_as_are_missing():
    stats = statistics()
    shortage = Shortage.of(stats, K, moment=True)
    filled = fill_in(stats, shortage)
    np.testing.assert_array_equal(shortage.seen, COUNTS)
    np.testing.assert_array_equal(shortage.starved, [True, True, False])
    np.testing.assert_array_equal(filled.seen, COUNTS)
    np.testing.assert_allclose(filled.tokens, [8, 8, 100], rtol=1e-6)
    pooled = sum(rows.T @ rows for rows in X) / 103
    for expert, missing in enumerate((8, 5, 0)):
        want = X[expert].T @ X[expert] + missing * pooled
        np.testing.assert_allclose(filled.hessian[expert], want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(filled.square[expert], np.diag(want), rtol=1e-4)


def test_what_is_counted_are_tokens_and_not_their_weights():
    """A hundred tokens of a tenth each are enough; a token of no weight is none."""
    weights = np.full(103, 0.1, np.float32)
    weights[:2] = 0.0
    stats = statistics({"hessian"}, weights)
    shortage = Shortage.of(stats, K, moment=True)
    np.testing.assert_array_equal(shortage.seen, [0, 1, 100])
    filled = fill_in(stats, shortage)
    np.testing.assert_allclose(filled.tokens, [0.8, 0.8, 10.0], rtol=1e-5)
    np.testing.assert_array_equal(filled.hessian[2], stats.hessian[2])


def test_a_peak_becomes_that_of_all_and_a_sample_takes_rows_of_others():
    stats = statistics()
    filled = fill_in(stats, Shortage.of(stats, K, moment=True))
    peak = np.abs(np.concatenate(X)).max(0)
    np.testing.assert_array_equal(filled.peak, np.stack([peak, peak, np.abs(X[2]).max(0)]))
    everyone = {row.tobytes() for row in np.concatenate(X)}
    for expert, rows in enumerate((8, 8, 100)):
        sample = np.asarray(filled.sample[expert])
        used = sample[np.any(sample != 0, axis=1)]
        assert len(used) == rows
        assert {row.tobytes() for row in used} <= everyone
        np.testing.assert_array_equal(sample[: COUNTS[expert]], X[expert])


def test_without_a_second_moment_as_many_tokens_as_a_sample_has_are_enough():
    assert Shortage.of(statistics({"sample"}), 4096, moment=False).enough == SAMPLE_ROWS
    assert Shortage.of(statistics({"hessian"}), 4096, moment=True).enough == 4096


def test_what_nobody_saw_stays_empty():
    stats = jax.tree.map(jnp.zeros_like, statistics())
    filled = fill_in(stats, Shortage.of(stats, K, moment=True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(filled))


def test_ranges_of_an_expert_without_tokens_are_clipped_by_the_tokens_of_others():
    """As if it had seen these, and not as if it had seen nothing, which would clip nothing."""
    weight = jnp.asarray(np.random.default_rng(0).standard_t(3, (3, K, 20)), jnp.float32)
    spec, chosen, said = QuantSpec(bits=3, group_size=32), Recipe(method="awq"), []
    of_input = MeasuredInput.of(statistics({"sample"}), "moe/up_proj", K, chosen, said.append)
    packed, _ = of_input.quantize(weight, spec, chosen, lambda weight: weight)
    rows = np.concatenate(X)[np.arange(8) * 103 // 8]
    function, options = QUANTIZERS["awq"].function, QUANTIZERS.options("awq", {})
    seen = function(weight[0], reduce_inputs(jnp.asarray(rows), frozenset({"sample"})), spec, options)
    plain = function(weight[0], None, spec, dataclasses.replace(options, clip=False))
    np.testing.assert_array_equal(np.asarray(packed.scales[0], np.float32), seen[1])
    assert (np.asarray(packed.scales[0], np.float32) != np.asarray(plain[1])).any()
    assert said == [
        "moe/up_proj: 2 of 3 experts saw fewer than 8 tokens (least 0); what they lack is filled up from all experts. "
        "More calibration text helps"
    ]


def routed_past_two_experts():
    """A block of Mixtral whose tokens all go to the last two of its four experts."""
    config, kind, params = next(iter(blocks_of("mixtral", "float32")))
    h, tokens = states(config, shape=(4, 16))
    h[..., 0] = 1e4  # the same direction for every token
    router = np.zeros((config.hidden_size, 4), np.float32)
    router[0] = [0.0, -1.0, 1.0, 2.0]
    params["moe"]["router"]["kernel"] = jnp.asarray(router)
    return config, kind, params, h, tokens


def test_an_expert_without_tokens_gets_the_channel_scales_of_all():
    config, kind, params, h, tokens = routed_past_two_experts()
    said, line = [], channel_lines(config, kind)[-1]
    specs = {"moe/down_proj": QuantSpec(bits=3, group_size=32)}
    where = (config, kind, params, [h[:2], h[2:]], [tokens[:2], tokens[2:]])
    _, (found,) = scale_block(*where, specs, ScalingOptions(), "block_0", said.append)
    stats = line_statistics(*where, frozenset({"absolute"}))[line]
    np.testing.assert_array_equal(stats.seen, [0, 0, 64, 64])
    assert found.alpha[0] == found.alpha[1] > 0
    mean = np.asarray(stats.absolute, np.float64).sum(0) / 128
    raw = np.maximum(mean ** found.alpha[0], 1e-4)
    np.testing.assert_allclose(found.scale[0], raw / np.sqrt(raw.max() * raw.min()), rtol=1e-5)
    np.testing.assert_array_equal(found.scale[0], found.scale[1])
    assert found.after <= found.before
    assert said == [
        "block_0/moe/down_proj: 2 of 4 experts saw fewer than 40 tokens (least 0); their channel scales are found with "
        "the tokens of all. More calibration text helps"
    ]


def test_an_expert_without_tokens_is_smoothed_by_the_peaks_of_all():
    config, kind, params, h, tokens = routed_past_two_experts()
    said, line = [], channel_lines(config, kind)[-1]
    specs = dict.fromkeys(block_matrices(config, kind), QuantSpec(bits=8))
    where = (config, kind, params, [h], [tokens])
    _, scales = smooth_block(*where, specs, SmoothQuantOptions(lines="all", strength=1.0), "block_0", said.append)
    peak = np.asarray(line_statistics(*where, frozenset({"peak"}))[line].peak)
    assert (peak[:2] == 0).all()
    np.testing.assert_allclose(scales[line][:2], np.broadcast_to(np.maximum(peak.max(0), 1e-5), (2, 40)), rtol=1e-6)
    np.testing.assert_allclose(scales[line][2:], np.maximum(peak[2:], 1e-5), rtol=1e-6)
    assert len(said) == 1


@pytest.mark.parametrize("needs", [{"sample"}, {"hessian"}])
def test_nothing_is_said_where_all_saw_enough(needs):
    said, recipe = [], Recipe(method="awq" if needs == {"sample"} else "gptq")
    stats = jax.tree.map(lambda leaf: leaf[2:], statistics(needs))
    MeasuredInput.of(stats, "moe/up_proj", K, recipe, said.append)
    assert said == []
