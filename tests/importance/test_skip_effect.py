"""Skip effect: models with a block left out, in float64; identities, depth and the count of passes."""

import by_hand
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import score
from lq.importance.skip_effect import without_block
from lq.models.source import InMemory

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 90, (3, 16), np.int32), "random", "random")
BLOCKS = 3


@pytest.fixture(scope="module")
def llama():
    config = llama_config(BLOCKS)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def source(request, llama):
    if request.param == "llama":
        return llama
    config = config_of("mixtral")
    return InMemory(config, random_params(config, dtype=jnp.float32))


def by_leaving_out(source, h, index, cut):
    """log p and log p' of all positions, float64."""
    behind = h[index].copy()
    if cut:
        behind[:, [0, *range(cut, behind.shape[1])]] = h[index + 1][:, [0, *range(cut, behind.shape[1])]]
    last = by_hand.rest(source, WINDOWS.tokens, index + 1, behind)
    return by_hand.log_probabilities(source, h[-1]), by_hand.log_probabilities(source, last)


@pytest.mark.parametrize(("skipped", "cut"), [("everywhere", 0), ("past", 8)])
def test_effects_are_those_of_float64(source, skipped, cut):
    found = {
        measure: score(source, "skip_effect", WINDOWS, {"measure": measure, "skipped": skipped, "batch_size": 2})
        for measure in ("kl", "l2")
    }
    h = by_hand.states(source, WINDOWS.tokens)
    for index in range(source.config.num_blocks):
        log_p, log_q = by_leaving_out(source, h, index, cut)
        divergence = by_hand.kl(log_p, log_q)[:, cut:-1].mean()
        furthest = np.linalg.norm(np.exp(log_p) - np.exp(log_q), axis=-1)[:, cut:].max()
        # Logits are known to about 5e-5 in float32 (64 products, at most 10), and so are KL and probabilities.
        assert found["kl"].values[f"block_{index}"] == pytest.approx(divergence, abs=1e-4)
        assert found["l2"].values[f"block_{index}"] == pytest.approx(furthest, abs=1e-4)


def test_what_it_took(llama):
    """The reference, the model as it is, and what lies behind each block."""
    passes = score(llama, "skip_effect", WINDOWS).passes
    assert passes == pytest.approx(1 + 1 + sum(range(BLOCKS)) / BLOCKS)


@pytest.mark.parametrize("options", [{}, {"measure": "l2"}, {"skipped": "past"}])
def test_a_block_that_does_nothing_is_not_missed(llama, options):
    """And where only one block does something, the depth of the effects is its place."""
    changed = by_hand.with_blocks(llama, lambda i, block: block if i == 2 else by_hand.writing(block, 0.0))
    found = score(changed, "skip_effect", WINDOWS, options)
    assert found.values["block_0"] == found.values["block_1"] == pytest.approx(0.0, abs=1e-6)
    if "skipped" not in options:  # behind the last block no later token takes anything
        assert found.ranking()[0] == "block_2"
        assert found.extra["depth"] == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("which", range(BLOCKS))
@pytest.mark.parametrize("measure", ["kl", "l2"])
def test_a_block_that_writes_more_is_first(llama, which, measure):
    found = score(by_hand.planted(llama, which), "skip_effect", WINDOWS, {"measure": measure})
    assert found.ranking()[0] == f"block_{which}"


def test_the_last_block_says_nothing_to_later_tokens(llama):
    assert score(llama, "skip_effect", WINDOWS, {"skipped": "past"}).values["block_2"] == pytest.approx(0.0, abs=1e-6)


def test_which_positions_are_left_out():
    before, after = np.zeros((1, 6, 2), np.float32), np.ones((1, 6, 2), np.float32)
    assert without_block([before], [after], 3)[0][0, :, 0].tolist() == [1, 0, 0, 1, 1, 1]
    assert without_block([before], [after], 0)[0] is before
    assert (after == 1).all(), "left alone"


def test_windows_without_a_past(llama):
    short = Windows(WINDOWS.tokens[:, :3], "random", "random")
    with pytest.raises(
        UserError, match=r"^skipped: past, but windows of 3 tokens have none to skip; write everywhere$"
    ):
        score(llama, "skip_effect", short, {"skipped": "past"})


def test_windows_of_one_token(llama):
    with pytest.raises(
        UserError, match=r"^windows: of one token, behind which nothing is predicted; give longer ones$"
    ):
        score(llama, "skip_effect", Windows(WINDOWS.tokens[:, :1], "random", "random"))
