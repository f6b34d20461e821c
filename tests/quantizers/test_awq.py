"""AWQ: the searches against float64 NumPy written from the formulas, and what the searches promise against the fold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from recorded import blocks_of, states
from small_models import llama_config, random_params

from lq.calibration.calls import calls_in_block, expert_of_rows
from lq.calibration.statistics import InputStats, reduce_inputs
from lq.errors import UserError
from lq.models.context import context_for
from lq.models.layers import inverse_frequencies
from lq.models.matrices import block_matrices
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS
from lq.quantizers.apply import quantize_matrix
from lq.quantizers.awq import AWQOptions, ScalingOptions, awq, clip_search
from lq.quantizers.awq_scaling import candidates, fake_quantize, scale_block, squared_errors
from lq.quantizers.channel_lines import channel_lines, fold, leaf_at, with_leaf
from lq.quantizers.line_inputs import line_statistics
from lq.quantizers.rtn import RTNOptions, rtn

pytestmark = pytest.mark.once

SPEC = QuantSpec(bits=3, group_size=32)


def rounded(weight: np.ndarray, bits: int, g: int, symmetric: bool = False) -> np.ndarray:
    """AWQ's quantizer in NumPy: `[K, N]` float32 to the values its codes stand for, scales stored as bfloat16.

    In float32, as the library's, so that both round alike what lies between two codes.
    """
    out = np.empty_like(weight)
    for start in range(0, len(weight), g):
        w = weight[start : start + g]
        if symmetric:
            scale, zero = np.abs(w).max(0) / np.float32(2 ** (bits - 1) - 1), 0.0
            least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        else:
            scale = np.maximum(w.max(0) - w.min(0), np.float32(1e-5)) / np.float32(2**bits - 1)
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
            least, most = 0, 2**bits - 1
            zero = np.clip(-np.round(w.min(0) / scale), least, most)
        out[start : start + g] = (np.clip(np.round(w / scale) + zero, least, most) - zero) * scale
    return out


def correlated(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """Inputs whose channels are correlated and differ in size."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((channels, channels)) / np.sqrt(channels) + np.eye(channels)
    return (rng.standard_normal((rows, channels)) @ mixing * 10 ** rng.uniform(-1, 0.5, channels)).astype(np.float32)


# Clipping


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_search_finds_the_least_output_error(bits, symmetric):
    """Every group of every column: the magnitude kept is that of the least float64 error of ten, by NumPy."""
    K, N, g = 80, 300, 32  # the last group is short, the columns are two chunks
    weight = np.random.default_rng(bits).standard_t(3, (K, N)).astype(np.float32)
    x = correlated(200, K)
    spec = QuantSpec(bits=bits, group_size=g, symmetric=symmetric)
    found = np.asarray(clip_search(jnp.asarray(weight), jnp.asarray(x), spec, AWQOptions()))
    assert found.shape == (3, N)
    different = 0
    for group, start in enumerate(range(0, K, g)):
        w, inputs = weight[start : start + g], x[:, start : start + g].astype(np.float64)
        kept, errors = [], []
        for i in range(10):
            m = np.abs(w).max(0) * np.float32(1 - i / 20)
            change = rounded(np.clip(w, -m, m), bits, g, symmetric).astype(np.float64) - w
            kept.append(m)
            errors.append(np.square(inputs @ change).mean(0))
        kept, errors = np.asarray(kept), np.asarray(errors)
        chosen = np.abs(kept - found[group]).argmin(0)
        np.testing.assert_allclose(kept[chosen, np.arange(N)], found[group], rtol=1e-6)
        # A float32 product of 32 terms is off by 32 * 6e-8 of |x||change|, a few times what is left of it here, and
        # its square by twice that: candidates whose errors differ by less may be taken for one another.
        least = errors.min(0)
        assert (errors[chosen, np.arange(N)] <= least * (1 + 1e-4)).all()
        different += (chosen != errors.argmin(0)).sum()
    assert different <= 3 * N // 100
    assert (found < np.abs(weight[:32]).max(0)).any(), "and something is clipped"


@pytest.mark.parametrize("g", [32, None])
def test_inputs_that_never_meet_are_told_by_their_mean_squares(g):
    """Each channel alone, as a lookup reads it: the ranges are those of a sample with a row for each."""
    weight = jnp.asarray(np.random.default_rng(0).standard_t(3, (80, 20)), jnp.float32)
    sizes = np.random.default_rng(1).uniform(0.5, 2.0, 80).astype(np.float32)
    spec = QuantSpec(bits=3, group_size=g)
    by_rows, by_squares = (
        np.asarray(clip_search(weight, jnp.asarray(inputs), spec, AWQOptions()))
        for inputs in (np.diag(sizes), np.square(sizes))
    )
    assert (by_rows != by_squares).mean() <= 0.02, "sums in another order"
    assert (by_squares < float(jnp.abs(weight).max())).any()


def test_an_only_candidate_clips_nothing():
    weight, x = jnp.asarray(np.random.default_rng(0).standard_normal((96, 20)), jnp.float32), jnp.ones((8, 96))
    stats = reduce_inputs(x, frozenset({"sample"}))
    plain = rtn(weight, None, SPEC, RTNOptions(convention="asym", clip="none"))
    for options in (AWQOptions(clip_grid=1, clip_shrink=1.0), AWQOptions(clip_shrink=0.05), AWQOptions(clip=False)):
        for got, want in zip(awq(weight, stats, SPEC, options), plain, strict=True):
            np.testing.assert_array_equal(got, want)
    largest = np.abs(np.asarray(weight)).reshape(3, 32, 20).max(1)
    np.testing.assert_array_equal(clip_search(weight, x, SPEC, AWQOptions(clip_shrink=0.05)), largest)


def test_no_group_is_clipped_whose_inputs_are_zero():
    """Of equal errors the first wins: an expert that no token went to is rounded plainly."""
    weight = jnp.asarray(np.random.default_rng(0).standard_t(3, (64, 20)), jnp.float32)
    x = jnp.asarray(correlated(50, 64)).at[:, :32].set(0.0)
    clip = np.asarray(clip_search(weight, x, SPEC, AWQOptions()))
    largest = np.abs(np.asarray(weight)).reshape(2, 32, 20).max(1)
    np.testing.assert_array_equal(clip[0], largest[0])
    assert (clip[1] < largest[1]).any()


def test_a_large_sample_is_thinned_evenly():
    weight = jnp.asarray(np.random.default_rng(0).standard_t(3, (64, 20)), jnp.float32)
    x = jnp.asarray(correlated(1500, 64))
    np.testing.assert_array_equal(
        clip_search(weight, x, SPEC, AWQOptions()), clip_search(weight, x[::3], SPEC, AWQOptions())
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_makes_outputs_better(bits):
    weight = np.random.default_rng(0).standard_t(3, (128, 64)).astype(np.float32)
    x = correlated(400, 128)
    stats = reduce_inputs(jnp.asarray(x), frozenset({"sample"}))
    spec, error = QuantSpec(bits=bits, group_size=32), {}
    for clip in (False, True):
        tensor = QTensor.from_codes(*awq(jnp.asarray(weight), stats, spec, AWQOptions(clip=clip)), spec)
        error[clip] = np.square(x.astype(np.float64) @ (np.asarray(tensor.dequantize(), np.float64) - weight)).sum()
    assert error[True] < error[False]


def test_queries_and_keys_are_not_clipped():
    per_matrix = QUANTIZERS["awq"].per_matrix
    clipped = {name: per_matrix(AWQOptions(), f"block_0/attention/{name}_proj").clip for name in "qkvo"}
    assert clipped == {"q": False, "k": False, "v": True, "o": True}
    assert per_matrix(AWQOptions(), "block_0/mlp/up_proj") == AWQOptions()
    assert not per_matrix(AWQOptions(clip_grid=10), "block_0/attention/q_proj").clip


# Scales


def numpy_block(params, config, h):
    """A Llama block in float64: `(inputs, functions)` of the tensors that its four lines scale.

    Each function takes the kernels of its readers, by name, and returns what the inspected module makes of the input.
    """
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    B, S, _ = h.shape
    H, G, C = config.num_heads, config.num_kv_heads, config.head_dim

    def norm(x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotated(x):
        angle = np.arange(S)[:, None] * np.asarray(inverse_frequencies(config.kinds[0].rope, S), np.float64)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(x, q_proj, k_proj, v_proj):
        q, k, v = ((x @ w).reshape(B, S, -1, C) for w in (q_proj, k_proj, v_proj))
        k, v = (np.repeat(y, H // G, axis=2) for y in (rotated(k), v))
        scores = np.einsum("bshc,bthc->bhst", rotated(q), k) * config.query_scale
        scores = np.where(np.tril(np.ones((S, S), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhst,bthc->bshc", weights, v).reshape(B, S, H * C)

    def hidden(x, gate_proj, up_proj):
        gate = x @ gate_proj
        return gate / (1 + np.exp(-gate)) * (x @ up_proj)

    kernels = {path.split("/")[1]: leaf_at(p, path)["kernel"] for path in block_matrices(config, config.kinds[0])}
    some = lambda *names: {name: kernels[name] for name in names}  # noqa: E731
    x = norm(np.asarray(h, np.float64), p["attention_norm"]["scale"])
    heads = attend(x, **some("q_proj", "k_proj", "v_proj"))
    after = h + heads @ kernels["o_proj"]
    y = norm(after, p["mlp_norm"]["scale"])
    inner = hidden(y, **some("gate_proj", "up_proj"))
    return {
        "attention": (x, lambda **w: attend(x, **w) @ kernels["o_proj"]),
        "attention/o_proj": (heads, lambda o_proj: heads @ o_proj),
        "mlp": (y, lambda **w: hidden(y, **w) @ kernels["down_proj"]),
        "mlp/down_proj": (inner, lambda down_proj: inner @ down_proj),
    }


@pytest.mark.parametrize("duo", [False, True])
def test_losses_and_choice_equal_numpy_from_the_formula(duo):
    """All candidates of all four lines of a block with two query heads to a key/value head."""
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    h, tokens = states(config, shape=(4, 24))
    batches, rows = [h[:2], h[2:]], [tokens[:2], tokens[2:]]
    options = ScalingOptions(duo=duo)
    specs = dict.fromkeys(block_matrices(config, kind), SPEC)
    _, report = scale_block(config, kind, params, batches, rows, specs, options)
    want = numpy_block(params, config, h)
    statistics = line_statistics(config, kind, params, batches, rows, frozenset({"absolute"}))
    for line, found in zip(channel_lines(config, kind), report, strict=True):
        x, function = want[line.inspected]
        kernels = {path.split("/")[1]: np.asarray(leaf_at(params, path)["kernel"]) for path in line.readers}
        level = np.abs(x).reshape(-1, x.shape[-1]).mean(0)
        magnitude = np.concatenate([relative_weight(w) for w in kernels.values()], axis=1).mean(1)
        if line.sharing == 2:  # query heads 0 and 1 read key/value head 0
            level, magnitude = (y.reshape(2, 2, 16).mean(1).ravel() for y in (level, magnitude))
        scales = [np.ones_like(level)] if duo else []
        for i in range(20):
            scale = level ** (i / 20)
            if duo:
                scale = scale / (magnitude ** (1 - i / 20) + 1e-4)
            scale = np.maximum(scale, 1e-4)
            scales.append(scale / np.sqrt(scale.max() * scale.min()))
        losses = []
        for scale in scales:
            spread = scale if line.sharing == 1 else np.repeat(scale.reshape(2, 1, 16), 2, 1).ravel()
            spread = spread.astype(np.float32)[:, None]
            changed = {name: (rounded(w * spread, 3, 32) / spread).astype(np.float64) for name, w in kernels.items()}
            losses.append(np.square(function(**changed) - function(**kernels)).mean())
        rounding = tuple((path, SPEC, options.rounding(SPEC)) for path in line.readers)
        _, mine = candidates(line, statistics[line], params, rounding, options)
        # Means of absolute values are float32 sums of 96 numbers; the scales are powers of them.
        np.testing.assert_allclose(mine[:, 0], scales, rtol=2e-6)
        errors = [
            squared_errors(config, kind, line, rounding, params, row, batch, mine)
            for batch, row in zip(batches, rows, strict=True)
        ]
        got = np.sum(errors, axis=0)[:, 0] / h.size
        # Outputs change by a tenth and are off by 1e-6 of themselves in float32: 1e-5 of the change, twice that of its
        # square. A weight on a tie may go to the other code in one of 64 rows of one of 64 columns: 1 / 4096.
        np.testing.assert_allclose(got, losses, rtol=1e-3)
        best = int(np.argmin(losses))
        assert losses[0] > losses[best] * 1.01
        alpha = found.alpha[0]
        index = 0 if alpha is None else round(alpha * 20) + duo
        assert losses[index] <= losses[best] * (1 + 1e-3)
        assert found.before == pytest.approx(losses[0], rel=1e-3)
        assert found.after == pytest.approx(losses[index], rel=1e-3)


def relative_weight(w: np.ndarray) -> np.ndarray:
    """|w| over the largest of its group of 32, `[K, N]`."""
    grouped = np.abs(w.astype(np.float64)).reshape(-1, 32, w.shape[1])
    return (grouped / (grouped.max(1, keepdims=True) + 1e-6)).reshape(w.shape)


DIFFERENT = ["gemma2", "gpt2", "llama", "opt"]  # in their lines, norms or activations; with experts: mixtral


@pytest.mark.long
@pytest.mark.parametrize(("case", "duo"), [*((case, False) for case in DIFFERENT), ("mixtral", True)])
def test_the_fold_gives_what_the_search_promised(case, duo):
    """In every family and line: the loss is no more than that of plain rounding, and rounding the folded block to
    nearest changes the inspected module's output by exactly as much as the search said."""
    blocks = {
        channel_lines(config, kind): (config, kind, params) for config, kind, params in blocks_of(case, "float32")
    }
    for lines, (config, kind, params) in blocks.items():
        h, tokens = states(config)
        specs = dict.fromkeys(block_matrices(config, kind), SPEC)
        options = ScalingOptions(duo=duo, scale_grid=5)
        _, report = scale_block(config, kind, params, [h], [tokens], specs, options)
        assert [found.line for found in report] == list(lines)
        for found in report:
            assert found.after <= found.before
            assert len(found.alpha) == (found.line.experts or 1)
            # The codes are the same: of one product in float32. Outputs are off by 1e-6 of themselves and change by a
            # tenth or more, their change by 1e-5, its square by twice that.
            folded = fold(params, found.line, jnp.asarray(found.scale))
            promised = {"before": loss_of_rounding(config, kind, params, found.line, h, tokens)}
            promised["after"] = loss_of_rounding(config, kind, folded, found.line, h, tokens)
            assert promised["before"] == pytest.approx(found.before, rel=1e-4)
            assert promised["after"] == pytest.approx(found.after, rel=1e-4)
        assert sum(found.after for found in report) < 0.97 * sum(found.before for found in report)


def loss_of_rounding(config, kind, params, line, h, tokens) -> float:
    """Mean squared change of the inspected module's output in a run of the block, its readers rounded as they are."""
    changed = params
    for path in line.readers:
        leaf = leaf_at(params, path)
        packed = quantize_matrix(leaf["kernel"], None, SPEC, "rtn", RTNOptions(convention="asym", clip="none"))
        changed = with_leaf(changed, path, {**leaf, "kernel": packed.dequantize()})
    before, after = (np.asarray(output(config, kind, tree, line, h, tokens), np.float64) for tree in (params, changed))
    return float(np.square(after - before).mean())


@functools.partial(jax.jit, static_argnames=("config", "kind", "line"))
def output(config, kind, params, line, h, tokens):
    """Of the line's inspected module."""
    call = calls_in_block(config, kind, params, h, context_for(tokens), {line.inspected: "__call__"})[line.inspected]
    return call.result[0] if line.inspected == "attention" else call.result


def test_alpha_zero_is_plain_rounding_to_the_bit():
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    h, tokens = states(config)
    specs = dict.fromkeys(block_matrices(config, kind), SPEC)
    folded, report = scale_block(config, kind, params, [h], [tokens], specs, ScalingOptions(scale_grid=1))
    jax.tree.map(np.testing.assert_array_equal, folded, params)
    assert all(found.alpha == (0.0,) and found.before == found.after for found in report)
    weight, options = params["mlp"]["up_proj"]["kernel"], RTNOptions(convention="asym", clip="none")
    np.testing.assert_array_equal(
        fake_quantize(weight, SPEC, options), quantize_matrix(weight, None, SPEC, "rtn", options).dequantize()
    )


def test_a_salient_channel_is_rounded_s_times_as_finely():
    """Groups that reach from -1 to 1 whatever s: the step is 2 / 7, and the error of w, |w| < 1 / s, is uniform in
    half of it, divided by s. Mean square step^2 / 12 / s^2."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(-0.99, 0.99, (32, 40_000)).astype(np.float32)
    weight[0], weight[1] = -1.0, 1.0
    spec = QuantSpec(bits=3, group_size=32, scale_dtype="float32")
    options = RTNOptions(convention="asym", clip="none")
    for s in (1.0, 2.0, 4.0):
        weight[5] = rng.uniform(-0.99, 0.99, 40_000) / s
        rows = np.ones((32, 1), np.float32)
        rows[5] = s
        change = np.asarray(fake_quantize(jnp.asarray(weight * rows), spec, options)) / rows - weight
        # The mean square of 40,000 uniform numbers has a standard error of 0.9 / sqrt(40,000) = 0.45 %, thrice that is
        # allowed, and 1 % for the levels at the ends, beyond which there is no half step.
        assert np.square(change[5]).mean() == pytest.approx((2 / 7) ** 2 / 12 / s**2, rel=0.025)


def test_a_salient_channel_is_found():
    """With one channel thirty times as active as the others the best s is not 1, and the loss falls to a third."""
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    params["mlp_norm"]["scale"] = params["mlp_norm"]["scale"].at[7].multiply(30.0)
    h, tokens = states(config)
    specs = dict.fromkeys(("mlp/gate_proj", "mlp/up_proj"), SPEC)
    folded, (found,) = scale_block(config, kind, params, [h], [tokens], specs, ScalingOptions())
    assert found.line.producer == "mlp_norm"
    assert found.alpha[0] > 0
    assert found.after < found.before / 3
    ratio = np.asarray(params["mlp_norm"]["scale"] / folded["mlp_norm"]["scale"])
    assert ratio.argmax() == 7


def test_lines_without_a_matrix_to_quantize_are_left_alone():
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    h, tokens = states(config)
    folded, report = scale_block(config, kind, params, [h], [tokens], {"attention/k_proj": SPEC}, ScalingOptions())
    assert [found.line.producer for found in report] == ["attention_norm"]
    np.testing.assert_array_equal(folded["mlp_norm"]["scale"], params["mlp_norm"]["scale"])
    ratio = folded["attention_norm"]["scale"] / params["attention_norm"]["scale"]
    for name in "qkv":  # those that stay dense are multiplied like the one that is searched for
        got, kernel = (tree["attention"][f"{name}_proj"]["kernel"] for tree in (folded, params))
        np.testing.assert_allclose(got * ratio[:, None], kernel, rtol=1e-6)


def test_each_expert_has_its_own_exponent():
    """And one that saw enough tokens is judged by them alone."""
    config, kind, params = next(iter(blocks_of("mixtral", "float32")))
    h, tokens = states(config, shape=(16, 16))
    specs = {"moe/down_proj": SPEC}
    rows = [h[:8], h[8:]], [tokens[:8], tokens[8:]]
    folded, (found,) = scale_block(config, kind, params, *rows, specs, ScalingOptions())
    assert found.line.shape == (4, 40)
    assert len(set(found.alpha)) > 1
    for expert in range(4):
        ratio = folded["moe"]["down_proj"]["kernel"][expert] / params["moe"]["down_proj"]["kernel"][expert]
        np.testing.assert_allclose(ratio, np.broadcast_to(found.scale[expert][:, None], ratio.shape), rtol=1e-6)


def test_a_channel_that_is_never_active_has_a_finite_scale():
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    params["mlp_norm"]["scale"] = params["mlp_norm"]["scale"].at[3].set(0.0)
    h, tokens = states(config)
    specs = dict.fromkeys(block_matrices(config, kind), SPEC)
    for duo in (False, True):
        folded, _ = scale_block(config, kind, params, [h], [tokens], specs, ScalingOptions(duo=duo))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(folded))


def test_searches_are_deterministic():
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    h, tokens = states(config)
    specs = dict.fromkeys(block_matrices(config, kind), SPEC)
    first, second = (scale_block(config, kind, params, [h], [tokens], specs, ScalingOptions()) for _ in range(2))
    assert first[1] == second[1]
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])


def test_compiles_once_for_blocks_of_one_kind():
    """Four lines and one pass of statistics, whatever the number of blocks."""
    config = dataclasses.replace(llama_config(3), norm_eps=3e-5)  # of no other test
    params = random_params(config, dtype=jnp.float32)
    h, tokens = states(config)
    specs = dict.fromkeys(block_matrices(config, config.kinds[0]), SPEC)
    before = squared_errors._cache_size()
    for index, kind in enumerate(config.kinds):
        scale_block(config, kind, params[f"block_{index}"], [h, h], [tokens, tokens], specs, AWQOptions())
    assert squared_errors._cache_size() == before + 4
    scale_block(config, config.kinds[0], params["block_0"], [h], [tokens], specs, AWQOptions(clip_grid=7))
    assert squared_errors._cache_size() == before + 4, "options that the search does not read do not count"


# Mistakes


def test_conventions_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"^awq: convention 'symr' does not fit asymmetric codes; write asym0 or asym$"):
        AWQOptions(convention="symr").rounding(QuantSpec(bits=4))
    with pytest.raises(
        UserError, match=r"^awq: convention 'asym' does not fit symmetric codes; write symu or symr or symf$"
    ):
        AWQOptions(convention="asym").rounding(QuantSpec(bits=4, symmetric=True))
    assert AWQOptions().rounding(QuantSpec(bits=4, symmetric=True)).convention == "symr"
    assert AWQOptions().rounding(QuantSpec(bits=4)).convention == "asym"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale_grid": 0}, "awq: option scale_grid: 0; write 1 or more"),
        ({"clip_grid": 0}, "awq: option clip_grid: 0; write 1 or more"),
        ({"clip_shrink": 0.0}, "awq: option clip_shrink: 0.0; write a number above 0, at most 1"),
        ({"clip_shrink": 1.5}, "awq: option clip_shrink: 1.5; write a number above 0, at most 1"),
        (
            {"scale": False, "duo": True},
            "awq: option duo: True, but with scale: false no scales are searched; leave it out",
        ),
        (
            {"scale": False, "scale_grid": 10},
            "awq: option scale_grid: 10, but with scale: false no scales are searched; leave it out",
        ),
        (
            {"clip": False, "clip_grid": 10},
            "awq: option clip_grid: 10, but with clip: false no ranges are searched; leave it out",
        ),
    ],
)
def test_searches_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        QUANTIZERS.options("awq", given)


@pytest.mark.parametrize("stats", [None, InputStats(tokens=jnp.ones(()))])
def test_clipping_without_inputs_is_refused(stats):
    with pytest.raises(
        UserError, match=r"^awq: ranges are clipped by the inputs; give calibration data, or write clip: f"
    ):
        awq(jnp.ones((32, 4)), stats, SPEC, AWQOptions())


def test_inputs_that_are_not_finite_are_refused_by_name():
    config = llama_config(1)
    kind, params = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"]
    h, tokens = states(config)
    h[0, 3, 5] = np.inf
    specs = dict.fromkeys(block_matrices(config, kind), SPEC)
    with pytest.raises(
        UserError, match=r"^block_2/attention: its output is NaN or infinite on the calibration text; [^\n]*$"
    ):
        scale_block(config, kind, params, [h], [tokens], specs, ScalingOptions(), "block_2")


def test_a_spec_for_a_matrix_that_is_not_there_is_a_defect():
    config = llama_config(1)
    params = random_params(config, dtype=jnp.float32)["block_0"]
    with pytest.raises(ValueError, match="block has no matrix mlp/fc1"):
        scale_block(config, config.kinds[0], params, [], [], {"mlp/fc1": SPEC}, ScalingOptions())


def test_a_packed_matrix_is_a_defect():
    config = llama_config(1)
    params = random_params(config, dtype=jnp.float32)["block_0"]
    packed = quantize_matrix(params["mlp"]["up_proj"]["kernel"], None, SPEC, "rtn", RTNOptions(clip="none"))
    params["mlp"]["up_proj"]["kernel"] = packed
    h, tokens = states(config)
    with pytest.raises(ValueError, match=r"^mlp/up_proj/kernel is packed; scales are folded before quantizing$"):
        scale_block(config, config.kinds[0], params, [h], [tokens], {}, ScalingOptions())


def test_experts_are_searched_on_their_own_rows():
    """The statistics of an expert's tensor are those of the rows that went to it."""
    config, kind, params = next(iter(blocks_of("qwen3_moe", "float32")))
    h, tokens = states(config)
    line = channel_lines(config, kind)[-1]
    x, per_expert = calls_in_block(config, kind, params, h, context_for(tokens), {line.inspected: "__call__"})[
        line.inspected
    ].args
    expert = np.asarray(expert_of_rows(per_expert, x.shape[0]))
    assert len(expert) == 2 * 12 * 3
    stats = line_statistics(config, kind, params, [h, h], [tokens, tokens], frozenset({"absolute", "peak"}))[line]
    for e in range(6):
        rows = np.abs(np.asarray(x, np.float64))[expert == e]
        assert stats.tokens[e] == 2 * len(rows)
        # One float32 forward pass compiled as a whole, the other operation by operation.
        np.testing.assert_allclose(stats.absolute[e], 2 * rows.sum(0), rtol=1e-4)
        np.testing.assert_allclose(stats.peak[e], rows.max(0, initial=0.0), rtol=1e-4)
    assert fold(params, line, jnp.ones(line.shape))["moe"].keys() == params["moe"].keys()
