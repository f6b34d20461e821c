"""Scores by forward passes and by weights: on a model of every family, in any order of windows; what they refuse."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import FAMILIES, config_of
from small_models import random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import score
from lq.importance.units import units_of
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe

pytestmark = [pytest.mark.once, pytest.mark.long]

# As many windows as two full batches: a batch of another size is another program, and rounds otherwise.
WINDOWS = Windows(np.random.default_rng(0).integers(1, 90, (4, 12), np.int32), "random", "random")
FORMAT = {"bits": [2], "group_size": 32, "options": {"clip": "none"}}
METRICS = {
    "cfsp": {},
    "logit_lens": {},
    "jaccard": {"k": 5, "tokens": "all"},
    "skip_effect": {},
    "zeroth_order": {"probes": 1, "unit": "part"},
    "output_mse": {**FORMAT, "unit": "part"},
    "linearity": {**FORMAT, "unit": "group", "levels": [0.1]},
    "nsds": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_unit_has_a_score_whatever_the_order_of_the_windows(family):
    config = config_of(family)
    source = InMemory(config, random_params(config, dtype=jnp.float32))
    shuffled = dataclasses.replace(WINDOWS, tokens=WINDOWS.tokens[[2, 1, 3, 0]])
    for metric, options in METRICS.items():
        options = options if metric == "nsds" else {**options, "batch_size": 2}
        one, other = (score(source, metric, windows, options) for windows in (WINDOWS, shuffled))
        unit = options.get("unit", "block")
        assert list(one.values) == list(units_of(config, unit)), metric
        assert np.isfinite(list(one.values.values())).all(), metric
        # A window's states do not depend on its neighbours, and sums over windows are float64.
        np.testing.assert_allclose(
            list(one.values.values()), list(other.values.values()), rtol=1e-5, atol=1e-9, err_msg=metric
        )


@pytest.fixture(scope="module")
def llama():
    config = config_of("llama")
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.mark.parametrize("metric", ["zeroth_order", "nsds", "output_mse", "linearity"])
def test_a_packed_model_is_refused(llama, metric):
    packed = PlannedSource(llama, {"block_0/mlp/up_proj": QuantSpec(bits=2, group_size=32)}, Recipe())
    with pytest.raises(UserError, match=rf"^metric {metric}: block_0 is packed; score the original model$"):
        score(packed, metric, WINDOWS)


@pytest.mark.parametrize("metric", ["output_mse", "linearity"])
def test_what_scales_channels_is_refused(llama, metric):
    """Its matrices are no approximations of the original ones."""
    with pytest.raises(UserError, match=rf"^metric {metric}: awq scales channels, .*; write options scale: false"):
        score(llama, metric, WINDOWS, {**FORMAT, "method": "awq", "options": {}})
