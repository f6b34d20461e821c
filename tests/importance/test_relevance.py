"""Gradient times activation: how the loss changes when what a part writes is made a little larger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import TOKENS, random_model
from whole_model import in_float64

from lq.calibration.branches import branch_writers
from lq.calibration.data import Windows
from lq.importance import score
from lq.importance.backward import Backward
from lq.importance.relevance import relevances
from lq.models.context import context_for
from lq.models.decoder import Decoder, apply_block, embed, head
from lq.models.source import InMemory

pytestmark = pytest.mark.once

CASES = ["llama, tied", "mixtral, untied", "gemma2, tied", "opt, tied"]
STEP = 1e-5


def losses(logits):
    log_q = jax.nn.log_softmax(logits[:, :-1])
    return np.asarray(-jnp.take_along_axis(log_q, jnp.asarray(TOKENS)[:, 1:, None], axis=-1).sum((1, 2)))


def with_larger_part(config, params, index, part, factor):
    """What writes a branch last is a norm's scale and bias, or a matrix and its bias."""
    block = params[f"block_{index}"]
    writer = branch_writers(config, config.kinds[index])[part]
    if config.post_norms:
        offset = config.norm_offset
        changed = {**block[writer], "scale": factor * (block[writer]["scale"] + offset) - offset}
    else:
        name = "o_proj" if part == "attention" else "down_proj"
        changed = {**block[writer], name: jax.tree.map(lambda leaf: factor * leaf, block[writer][name])}
    return {**params, f"block_{index}": {**block, writer: changed}}


def loss_with_larger_block(config, params, index, factor):
    context = context_for(jnp.asarray(TOKENS))
    h = embed(config, params, TOKENS, context)
    for i, kind in enumerate(config.kinds):
        out = apply_block(config, kind, params[f"block_{i}"], h, context)
        h = h + factor * (out - h) if i == index else out
    return losses(head(config, params, h))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_change_of_the_loss_with_what_is_written(case):
    """Central differences in float64: of a step of 1e-5 the third derivative leaves 1e-10, rounding 1e-10."""
    config, params = random_model(case)
    with jax.enable_x64(True):
        params = in_float64(params)
        backward = Backward(InMemory(config, params), Windows(TOKENS, "random", "random"), dtype=jnp.float64)
        got = backward.gradients(InMemory(config, params), relevances).blocks
        for index, block in enumerate(got):
            for part, found in block.items():
                if part == "block":
                    ahead, behind = (loss_with_larger_block(config, params, index, 1 + s) for s in (STEP, -STEP))
                else:
                    ahead, behind = (
                        losses(
                            Decoder(config).apply(
                                {"params": with_larger_part(config, params, index, part, 1 + s)}, TOKENS
                            )
                        )
                        for s in (STEP, -STEP)
                    )
                np.testing.assert_allclose(found, (ahead - behind) / (2 * STEP), rtol=1e-4, atol=1e-5)


def test_shares_of_blocks_and_of_parts():
    config, params = random_model("llama, tied")
    source = InMemory(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))
    windows = Windows(TOKENS, "random", "random")
    found = Backward(source, windows).gradients(source, relevances).blocks
    for unit, parts in (("block", ["block"]), ("part", ["attention", "mlp"])):
        got = score(source, "relevance", windows, {"unit": unit})
        sizes = [np.abs(block[part]).mean() for block in found for part in parts]
        names = [f"block_{i}" if part == "block" else f"block_{i}/{part}" for i in range(2) for part in parts]
        assert list(got.values) == names
        assert list(got.values.values()) == pytest.approx(list(np.array(sizes) / np.sum(sizes)), rel=1e-5)
        assert got.passes == 4
