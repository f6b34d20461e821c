"""Logit lens: float64 divergences of what every state would say, and what follows from the definition."""

import by_hand
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.importance import score
from lq.models.source import InMemory

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 90, (4, 16), np.int32), "random", "random")
BLOCKS = 3


@pytest.fixture(scope="module", params=["llama", "opt"])
def source(request):
    config = llama_config(BLOCKS) if request.param == "llama" else config_of("opt")
    return InMemory(config, random_params(config, dtype=jnp.float32))


def test_steps_are_those_of_float64(source):
    h = by_hand.states(source, WINDOWS.tokens)
    final = by_hand.log_probabilities(source, h[-1])
    lens = [by_hand.kl(by_hand.log_probabilities(source, one), final)[:, :-1].mean() for one in h]
    found = score(source, "logit_lens", WINDOWS, {"batch_size": 2})
    # A logit is a sum of up to 64 products and at most about 10: known to 10 * 64 * 2^-24 in float32, as is a KL.
    assert list(found.extra["kl"].values()) == pytest.approx(lens[1:], abs=5e-5)
    assert list(found.values.values()) == pytest.approx(-np.diff(lens), abs=1e-4)
    assert sum(found.values.values()) == pytest.approx(lens[0], abs=1e-4), "the steps are the whole way"
    assert found.passes == pytest.approx(2.0)


def test_a_block_that_does_nothing_takes_no_step():
    config = llama_config(BLOCKS)
    source = InMemory(config, random_params(config, dtype=jnp.float32))
    changed = by_hand.with_blocks(source, lambda i, block: by_hand.writing(block, 0.0) if i == 1 else block)
    assert score(changed, "logit_lens", WINDOWS).values["block_1"] == 0.0


@pytest.mark.parametrize("which", range(BLOCKS))
def test_a_block_that_writes_more_is_first(which):
    config = llama_config(BLOCKS)
    source = InMemory(config, random_params(config, dtype=jnp.float32))
    assert score(by_hand.planted(source, which), "logit_lens", WINDOWS).ranking()[0] == f"block_{which}"
