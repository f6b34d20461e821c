"""LSAQ: sets of first tokens, from float64 logits; and the direction, which a public port has the wrong way round."""

import itertools

import by_hand
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.jaccard import first_tokens, shared_tokens
from lq.models.source import InMemory

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(1, 90, (5, 16), np.int32), "random", "random")
BLOCKS = 3


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def source(request):
    config = llama_config(BLOCKS) if request.param == "llama" else config_of("gemma2")
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_overlaps_are_those_of_float64(source, tokens):
    k = 7
    sets, margin = [], np.inf
    for h in by_hand.states(source, WINDOWS.tokens):
        logits = by_hand.log_probabilities(source, h)
        logits = logits[:, -1:] if tokens == "last" else logits
        order = np.sort(logits, axis=-1)
        margin = min(margin, (order[..., -k] - order[..., -k - 1]).min())
        sets.append([[set(row) for row in window] for window in np.argsort(-logits, axis=-1)[..., :k]])
    expected = []
    for before, after in itertools.pairwise(sets):
        pairs = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)]
        expected.append(np.mean([1 - len(a & b) / len(a | b) for a, b in pairs]))
    found = score(source, "jaccard", WINDOWS, {"k": k, "tokens": tokens, "batch_size": 2})
    # Where the k-th and the next logit are nearer than float32 tells apart, one of a set's tokens may be another.
    if margin > 5e-5:
        assert list(found.values.values()) == pytest.approx(expected, abs=1e-12)
    else:
        count = len(sets[0]) * len(sets[0][0])
        assert list(found.values.values()) == pytest.approx(expected, abs=4 / (k * count))


def test_sets():
    a = jnp.asarray([[3, 1, 2], [3, 1, 2], [3, 1, 2]])
    b = jnp.asarray([[2, 3, 1], [4, 5, 1], [7, 8, 9]])
    assert np.asarray(shared_tokens(a, b)).tolist() == [3, 1, 0]


def test_the_final_norm_comes_first(source):
    """So that the length of a state does not matter."""
    config = source.config
    h = np.random.default_rng(0).standard_normal((1, 4, config.hidden_size)).astype(np.float32)
    head_params = {"head": source.head(), "embed": source.embed()}
    one, other = (np.asarray(first_tokens(config, head_params, factor * h, 5)) for factor in (8.0, 512.0))
    np.testing.assert_array_equal(one, other)


def test_nothing_changed_is_nothing_and_every_token_is_every_token():
    config = llama_config(BLOCKS)
    source = InMemory(config, random_params(config, dtype=jnp.float32))
    changed = by_hand.with_blocks(source, lambda i, block: by_hand.writing(block, 0.0) if i == 1 else block)
    found = score(changed, "jaccard", WINDOWS).values
    assert found["block_1"] == 0.0
    assert found["block_0"] > 0.0
    assert set(score(source, "jaccard", WINDOWS, {"k": 4096}).values.values()) == {0.0}


@pytest.mark.parametrize("which", range(BLOCKS))
def test_a_block_that_writes_more_is_first(which):
    config = llama_config(BLOCKS)
    source = InMemory(config, random_params(config, dtype=jnp.float32))
    assert score(by_hand.planted(source, which), "jaccard", WINDOWS).ranking()[0] == f"block_{which}"


def test_sets_that_cannot_be(source):
    with pytest.raises(UserError, match=r"^k: 0; write 1 or more tokens$"):
        METRICS.options("jaccard", {"k": 0})
    size = source.config.vocab_size
    with pytest.raises(UserError, match=rf"^k: {size + 1}, but the vocabulary has {size} tokens; write fewer, such as"):
        score(source, "jaccard", WINDOWS, {"k": size + 1})
