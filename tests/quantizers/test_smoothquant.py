"""SmoothQuant: equation 4 by NumPy, and that it makes activations and weights equally large."""

import jax.numpy as jnp
import numpy as np
import pytest
from recorded import blocks_of, states

from lq.calibration.calls import calls_in_block
from lq.errors import UserError
from lq.models.context import context_for
from lq.models.matrices import block_matrices
from lq.numerics.spec import QuantSpec
from lq.quantizers import SCALINGS
from lq.quantizers.channel_lines import channel_lines, fold, leaf_at
from lq.quantizers.smoothquant import SmoothQuantOptions, smooth_block, smoothing_scale

pytestmark = pytest.mark.once


def smoothed(case, options, paths=None, windows=4):
    config, kind, params = next(iter(blocks_of(case, "float32")))
    h, tokens = states(config, shape=(windows, 12))
    specs = dict.fromkeys(paths or block_matrices(config, kind), QuantSpec(bits=8, group_size=None))
    folded, scales = smooth_block(config, kind, params, [h[:3], h[3:]], [tokens[:3], tokens[3:]], specs, options)
    return config, kind, params, folded, scales, h, tokens


def peaks_of_weights(params, line):
    """Largest |w| of each of the readers' channels over the outputs of all readers."""
    kernels = [np.abs(np.asarray(leaf_at(params, path)["kernel"])).max(-1) for path in line.readers]
    return np.max(kernels, axis=0) if line.experts or kernels[0].ndim == 1 else np.max(kernels, axis=(0, 1))


def test_equation_4():
    peak, weight = np.asarray([4.0, 0.25, 0.0, 9.0]), np.asarray([1.0, 4.0, 1.0, 0.0])
    np.testing.assert_allclose(smoothing_scale(peak, weight, 0.5), [2.0, 0.25, 1e-5, 3 / 1e-5**0.5], rtol=1e-12)
    np.testing.assert_allclose(smoothing_scale(peak, weight, 1.0), [4.0, 0.25, 1e-5, 9.0], rtol=1e-12)
    np.testing.assert_allclose(smoothing_scale(peak, weight, 0.0), [1.0, 0.25, 1.0, 1e5], rtol=1e-12)


@pytest.mark.parametrize("case", ["llama", "opt", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_half_a_strength_makes_both_sides_equally_large(case):
    """Over two batches: of every channel max|x| / s = max|w| s, the root of their product before, line by line.

    Where query heads share a channel of v, the largest of them does.
    """
    config, kind, params, _, scales, h, tokens = smoothed(case, SmoothQuantOptions(lines="all"))
    assert list(scales) == list(channel_lines(config, kind))
    for line, scale in scales.items():
        assert scale.shape == line.shape
        if line.experts is not None:
            continue  # an expert without tokens has no peak; see the test of their own rows
        folded = fold(params, line, scale)
        call = calls_in_block(config, kind, folded, h, context_for(tokens), {line.inspected: "__call__"})
        x = np.abs(np.asarray(call[line.inspected].args[0])).reshape(-1, line.channels * line.sharing).max(0)
        # Readers of one channel together; two float32 quotients and a product.
        x, w = (line.gather(side).max(-2) for side in (x, peaks_of_weights(folded, line)))
        np.testing.assert_allclose(x, w, rtol=1e-5)


@pytest.mark.parametrize("windows", [4, 40])
def test_experts_are_smoothed_by_their_own_rows(windows):
    """By those of all experts where they saw fewer tokens than they have channels."""
    config, kind, params, folded, scales, h, tokens = smoothed(
        "mixtral", SmoothQuantOptions(lines="all"), windows=windows
    )
    line = channel_lines(config, kind)[-1]
    call = calls_in_block(config, kind, params, h, context_for(tokens), {line.inspected: "__call__"})[line.inspected]
    x, ends = np.abs(np.asarray(call.args[0])), np.cumsum(np.asarray(call.args[1]))
    starved = np.diff(ends, prepend=0) < x.shape[1]
    assert starved.any() == (windows == 4)
    for expert, rows in enumerate(np.split(x, ends[:-1])):
        rows = x if starved[expert] else rows
        weight = peaks_of_weights(params, line)[expert]
        want = np.maximum(np.sqrt(rows.max(0, initial=0.0) / np.maximum(weight, 1e-5)), 1e-5)
        np.testing.assert_allclose(scales[line][expert], want, rtol=1e-5)
    ratio = np.asarray(folded["moe"]["down_proj"]["kernel"] / params["moe"]["down_proj"]["kernel"])
    np.testing.assert_allclose(ratio, np.broadcast_to(scales[line][..., None], ratio.shape), rtol=1e-5)


def test_the_paper_smooths_after_norms_and_what_is_quantized():
    assert [line.producer for line in smoothed("llama", SmoothQuantOptions())[4]] == ["attention_norm", "mlp_norm"]
    some = smoothed("llama", SmoothQuantOptions(lines="all"), ["mlp/up_proj", "attention/o_proj"])[4]
    assert [line.producer for line in some] == ["attention/v_proj", "mlp_norm"]


def test_mistakes_are_refused():
    for strength in (-0.1, 1.1):
        with pytest.raises(UserError, match=f"^smoothquant: option strength: {strength}; write a number from 0 to 1$"):
            SCALINGS.options("smoothquant", {"strength": strength})
    config, kind, params = next(iter(blocks_of("llama", "float32")))
    h, tokens = states(config)
    h[1, 2, 3] = np.nan
    specs = {"attention/q_proj": QuantSpec(bits=8)}
    with pytest.raises(
        UserError, match=r"^block_4/attention/q_proj: its calibration inputs are NaN or infinite; [^\n]*$"
    ):
        smooth_block(config, kind, params, [jnp.asarray(h)], [tokens], specs, SmoothQuantOptions(), "block_4")
