"""Streamed gradients: those of the model in one piece, in float64, for several families and every loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import TOKENS, random_model
from small_models import llama_config, random_params
from whole_model import in_float64, kernels_of, whole_gradients, whole_loss, with_kernels

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance.backward import Backward
from lq.importance.losses import text_of, window_loss
from lq.models.decoder import abstract_params, head
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe

pytestmark = pytest.mark.once

WINDOWS = Windows(TOKENS, "random", "random")
# Between them: experts, windows, norms behind the parts, soft caps, biases, learned positions, longrope, both heads.
CASES = ["llama, tied", "gemma2, untied", "mixtral, untied", "opt, tied", "phi3, untied"]
# Sums of up to some thousand products, through two blocks and back, 2^-53 each: a few 1e-13 of the largest.
FLOAT64 = 1e-11


def everything(found, data):
    """A reduction that reduces nothing."""
    del data
    return found.kernel_gradients


def products(found, directions):
    return {path: jnp.vdot(gradient, directions[path]) for path, gradient in found.kernel_gradients.items()}


def moved(params, config, scale: float):
    """Other block matrices, by random numbers of a share of each one's size."""
    rng = np.random.default_rng(1)
    kernels = {p: np.asarray(w, np.float64) for p, w in kernels_of(config, params).items()}
    return with_kernels(params, {p: w + scale * w.std() * rng.standard_normal(w.shape) for p, w in kernels.items()})


def streamed(config, point, *, original=None, **options):
    """Per window the gradients of every matrix, by path, float64."""
    with jax.enable_x64(True):
        original = in_float64(point if original is None else original)
        backward = Backward(InMemory(config, original), WINDOWS, dtype=jnp.float64, **options)
        found = backward.gradients(InMemory(config, in_float64(point)), everything)
    blocks = enumerate(found.blocks)
    return {f"block_{i}/{path}": gradients for i, block in blocks for path, gradients in block.items()}


def assert_same(got, windows):
    assert list(got) == list(windows[0])
    for path, gradients in got.items():
        expected = np.stack([window[path] for window in windows])
        assert np.abs(gradients - expected).max() <= FLOAT64 * np.abs(expected).max(), path


@pytest.mark.long
@pytest.mark.once
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_model_in_one_piece(case):
    config, params = random_model(case)
    assert_same(streamed(config, params, batch_size=1), whole_gradients(config, params, TOKENS))


def test_gradients_of_the_divergence_from_the_original():
    config, params = random_model("llama, tied")
    point = moved(params, config, 0.1)
    got = streamed(config, point, original=params, loss="kl", batch_size=2)
    assert_same(got, whole_gradients(config, point, TOKENS, params))


def test_a_small_step_changes_the_divergence_by_the_gradient():
    """Central differences in float64: of a step of 1e-4 the third derivative leaves 1e-8, rounding 1e-12."""
    config, params = random_model("qwen3, untied")
    point, rng, step = moved(params, config, 0.1), np.random.default_rng(2), 1e-4
    kernels = {path: np.asarray(w, np.float64) for path, w in kernels_of(config, point).items()}
    direction = {path: rng.standard_normal(w.shape) * w.std() for path, w in kernels.items()}
    got = streamed(config, point, original=params, loss="kl")
    slope = sum((got[path].sum(0) * d).sum() for path, d in direction.items())
    with jax.enable_x64(True):
        ahead, behind = (
            whole_loss(config, in_float64(with_kernels(point, stepped)), TOKENS, in_float64(params))
            for stepped in ({p: w + sign * step * direction[p] for p, w in kernels.items()} for sign in (1, -1))
        )
    assert slope == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)


def test_losses_are_those_of_the_evaluation_and_what_they_took():
    config = llama_config(2, 32)
    params = random_params(config, dtype=jnp.float32)
    windows = Windows(np.random.default_rng(0).integers(1, 4096, (4, 12), np.int32), "random", "random", stride=8)
    original, other = InMemory(config, params), InMemory(config, random_params(config, 1, jnp.float32))
    mixed = InMemory(config, {**params, "block_1": other.block(1)})
    reference = make_reference(original, windows, batch_size=2)
    measured = evaluate(mixed, windows, reference=reference, batch_size=2)
    for loss, expected, before in (("nll", measured.nll, 0), ("kl", measured.kl, 1)):
        backward = Backward(original, windows, loss=loss, batch_size=2)
        assert backward.passes == before, "the reference"
        found = backward.gradients(mixed, everything)
        assert backward.passes == before + 4, "forward, once more, and two for the way back"
        assert found.tokens == measured.tokens
        # Logits of 32 products and a softmax over 4096 in float32, in another order.
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert backward.loss(mixed) == found.loss
        assert backward.passes == before + 5


def test_labels_are_drawn_from_the_model():
    """The mean of -ln q(label) over draws is the entropy of q, whose standard error is known."""
    config, rng = llama_config(1, 32), np.random.default_rng(0)
    params = {
        name: jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), part)
        for name, part in abstract_params(config).items()
    }
    (text,) = text_of(Windows(np.zeros((1, 3), np.int32), "zeros", "zeros"), 1)
    one, h = jax.tree.map(lambda a: a[0], text), jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    draws = jax.jit(jax.vmap(lambda seed: window_loss(config, "sampled", params, seed, one, h)))(np.arange(2000))
    log_q = np.asarray(jax.nn.log_softmax(head(config, params, h[None, :-1])[0]), np.float64)
    q = np.exp(log_q)
    entropy, variance = -(q * log_q).sum(), ((q * log_q**2).sum(-1) - (q * log_q).sum(-1) ** 2).sum()
    assert np.mean(draws) == pytest.approx(entropy, abs=4 * np.sqrt(variance / 2000))
    assert np.var(draws) == pytest.approx(variance, rel=0.5)


def source_of(blocks=2):
    config = llama_config(blocks, 32)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.mark.parametrize("loss", ["nll", "sampled", "kl"])
def test_what_windows_stand_beside_a_window_does_not_matter(loss):
    source, rng = source_of(), np.random.default_rng(0)
    tokens = rng.integers(1, 4096, (5, 12)).astype(np.int32)
    point = InMemory(source.config, random_params(source.config, 1, jnp.float32)) if loss == "kl" else source

    def found(order, batch_size):
        windows = Windows(tokens[order], "random", "random")
        return Backward(source, windows, loss=loss, batch_size=batch_size).gradients(point, everything)

    one, other = found(np.arange(5), 5), found(np.arange(5)[::-1], 2)
    # A divergence sums, at 11 positions, differences of two logarithms near ln 4096, each off by some 2^-24 of itself,
    # in either of two runs.
    rounding = 11 * 4 * np.log(4096) * 2.0**-24 if loss == "kl" else 0.0
    np.testing.assert_allclose(one.losses, other.losses[::-1], rtol=1e-6, atol=rounding)
    for block, same in zip(one.blocks, other.blocks, strict=True):
        for path, gradients in block.items():
            # Through two blocks in float32: some hundred products of 2^-24 each.
            assert np.abs(gradients - same[path][::-1]).max() <= 1e-5 * np.abs(gradients).max()


def test_equal_blocks_are_one_program():
    traced = []

    def reduce(found, data):
        traced.append(data)
        return {path: jnp.sum(gradient) for path, gradient in found.kernel_gradients.items()}

    source = source_of(4)
    Backward(source, WINDOWS, batch_size=1).gradients(source, reduce, lambda index: np.float32(index))
    assert len(traced) == 1, "four blocks, two batches, and data of each block"


def test_data_of_a_block_goes_with_its_gradients():
    source, rng = source_of(), np.random.default_rng(0)
    directions = {
        path: rng.standard_normal(shape).astype(np.float32) for path, shape in matrices(source.config).items()
    }

    def of_block(index):
        return {p.split("/", 1)[1]: d for p, d in directions.items() if p.startswith(f"block_{index}/")}

    backward = Backward(source, WINDOWS)
    found = backward.gradients(source, products, of_block).by_matrix()
    whole = backward.gradients(source, everything).by_matrix()
    for path, direction in directions.items():
        size = np.linalg.norm(whole[path]) * np.linalg.norm(direction)
        assert found[path] == pytest.approx((whole[path] * direction).sum(), abs=1e-5 * size)


def test_packed_weights_have_no_gradient():
    source = source_of()
    packed = PlannedSource(source, {"block_1/mlp/up_proj": QuantSpec(bits=4, group_size=32)}, Recipe())
    with pytest.raises(UserError, match=r"^block_1 is packed, and gradients are of dense weights; score the original"):
        Backward(packed, WINDOWS).gradients(packed, everything)


def test_one_token_predicts_nothing():
    with pytest.raises(UserError, match=r"^windows of 1 token: a loss needs a token before it; give windows of 2"):
        Backward(source_of(), Windows(np.ones((2, 1), np.int32), "ones", "ones"))
