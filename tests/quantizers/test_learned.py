"""What all learned roundings share: their start, what is stored, and the loop that reconstructs matrices and blocks."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_layers import (
    dequantized_float64,
    hessian_stats,
    inputs_with_common_factors,
    output_error_of_codes,
    random_weight,
)
from small_models import llama_config, random_params

from lq.errors import UserError
from lq.models.config import Experts
from lq.models.context import context_for
from lq.models.decoder import apply_block
from lq.models.matrices import block_matrices
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, reconstruct
from lq.quantizers.adaquant import ADAQUANT
from lq.quantizers.apply import quantize_matrix
from lq.quantizers.autoround import AUTOROUND
from lq.quantizers.flexround import FLEXROUND
from lq.quantizers.parametrization import codes_of, export, fake_quant, initial
from lq.quantizers.reconstruct import CHUNK, BlockFunction, drawn_windows, reconstruct_block
from lq.quantizers.rtn import RTNOptions, rtn

pytestmark = pytest.mark.once

METHODS = {"autoround": AUTOROUND, "flexround": FLEXROUND, "adaquant": ADAQUANT}
each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def options_of(method, **given):
    return QUANTIZERS.options(method, given)


START = {"autoround": "minmax", "flexround": "mse", "adaquant": "mse"}  # when not given, above one bit


def start_options(method, start=None, symmetric=False):
    """Those of `rtn` that a method begins with."""
    clip = {"minmax": "none", "mse": "mse"}[start or START[method]]
    return RTNOptions(convention="symf" if symmetric else "asym0", clip=clip)


def rounded(weight, spec, start):
    return rtn(jnp.asarray(weight), None, spec, start_options(None, start, spec.symmetric))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# Start and storage


@each_method
@each_kind
@pytest.mark.parametrize("start", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_steps_are_round_to_nearest(method, start, bits, symmetric):
    weight = jnp.asarray(random_weight(80, 6))  # the last group of 32 has 16 rows
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
    options = options_of(method, steps=0, start=start)
    found = QUANTIZERS[method].function(weight, hessian_stats(inputs_with_common_factors(400, 80)), spec, options)
    assert_same(found, rounded(weight, spec, start))


@each_method
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"symmetric": True},
        {"zero_dtype": "float16"},
        {"scale_dtype": "float16", "group_size": None},
        {"scale_dtype": "float32", "bits": 1, "symmetric": True},
    ],
    ids=str,
)
def test_what_is_trained_is_what_is_stored(method, kind):
    """With any theta the dequantized export equals the fake-quantized weight to the bit, in a stack too."""
    spec = QuantSpec(**{"bits": 3, "group_size": 32} | kind)
    weight = jnp.asarray(np.stack([random_weight(80, 6, seed=seed) for seed in (0, 1)]))
    options = options_of(method)
    theta, fixed = initial(METHODS[method], weight, spec, options)
    rng = np.random.default_rng(0)
    theta = jax.tree.map(lambda t: t + jnp.asarray(0.2 * rng.standard_normal(t.shape), jnp.float32), theta)
    theta = METHODS[method].project(theta, fixed, options)
    arguments = (METHODS[method], theta, fixed, weight, spec, options)
    stored = QTensor.from_codes(*export(*arguments), spec)
    np.testing.assert_array_equal(np.asarray(stored.dequantize()), np.asarray(fake_quant(*arguments)))


@each_kind
def test_codes_have_the_gradient_of_what_is_rounded_and_none_where_they_are_clipped(symmetric):
    for bits in (1, 2, 4):
        spec = QuantSpec(bits=bits, symmetric=symmetric)
        level = jnp.asarray(np.random.default_rng(0).uniform(-12, 12, 300), jnp.float32)
        zero = jnp.full_like(level, spec.zero_point if symmetric else 1.0)
        codes, pull = jax.vjp(functools.partial(codes_of, spec=spec), level, zero)
        of_level, of_zero = pull(jnp.ones_like(codes))
        exact = np.asarray(level, np.float64) + np.asarray(zero, np.float64)
        nearest = np.ceil(exact - 0.5) if bits == 1 and symmetric else np.round(exact)
        np.testing.assert_array_equal(np.asarray(codes), np.clip(nearest, 0, spec.max_code))
        inside = (nearest >= 0) & (nearest <= spec.max_code)
        np.testing.assert_array_equal(np.asarray(of_level), inside)
        np.testing.assert_array_equal(np.asarray(of_zero), inside)


@each_method
def test_the_last_group_is_not_what_it_is_padded_with(method):
    """A last group whose weights are far from zero: padding that counted as weights would widen its range."""
    weight = jnp.asarray(random_weight(80, 6) + np.where(np.arange(80) < 64, 0, 60.0)[:, None], jnp.float32)
    spec, options = QuantSpec(bits=4, group_size=32, symmetric=True), options_of(method, start="minmax", steps=20)
    found = QUANTIZERS[method].function(weight, hessian_stats(inputs_with_common_factors(400, 80)), spec, options)
    assert np.abs(dequantized_float64(found, spec) - np.asarray(weight))[64:].max() < 12  # of steps of 60 / 8


# One matrix


@functools.cache
def learned(method, bits, symmetric, **options):
    weight, x = random_weight(96, 8), inputs_with_common_factors(400, 96)
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
    quantize = jax.jit(lambda w, s: QUANTIZERS[method].function(w, s, spec, options_of(method, **options)))
    return weight, x, spec, quantize(jnp.asarray(weight), hessian_stats(x))


@each_method
@each_kind
@pytest.mark.parametrize("bits", [2, 4])
def test_outputs_are_nearer_than_those_of_round_to_nearest(method, bits, symmetric):
    """In float64 from the formula: three quarters of the error of either start, or less."""
    weight, x, spec, found = learned(method, bits, symmetric)
    starts = [output_error_of_codes(weight, rounded(weight, spec, start), spec, x) for start in ("minmax", "mse")]
    assert output_error_of_codes(weight, found, spec, x) < min(starts) * 3 / 4


@each_method
def test_learning_never_ends_worse_than_it_began(method):
    """With a learning rate that only does harm the start is returned: its step had the least loss."""
    weight, x = jnp.asarray(random_weight(96, 8)), inputs_with_common_factors(400, 96)
    spec, options = QuantSpec(bits=8, group_size=32), options_of(method, start="minmax", learning_rate=50.0, steps=5)
    found = QUANTIZERS[method].function(weight, hessian_stats(x), spec, options)
    assert_same(found, rounded(weight, spec, "minmax"))


@each_method
def test_inputs_that_are_zero_throughout_leave_round_to_nearest(method):
    weight, spec = jnp.asarray(random_weight(96, 8)), QuantSpec(bits=3, group_size=32)
    found = QUANTIZERS[method].function(weight, hessian_stats(np.zeros((9, 96))), spec, options_of(method, steps=5))
    assert_same(found, rounded(weight, spec, START[method]))


@pytest.mark.long
@each_method
def test_a_stack_of_experts_is_learned_expert_by_expert(method):
    weight, spec = np.stack([random_weight(64, 6, seed=seed) for seed in (0, 1)]), QuantSpec(bits=3, group_size=32)
    stats = [hessian_stats(inputs_with_common_factors(400, 64, seed=seed)) for seed in (2, 3)]
    quantize = lambda w, s: QUANTIZERS[method].function(jnp.asarray(w), s, spec, options_of(method, steps=20))  # noqa: E731
    stacked = quantize(weight, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats))
    for i in range(2):
        alone = quantize(weight[i], stats[i])
        # Sums of a batched product may differ in the last bits; a weight on the edge then falls to the other side.
        assert (np.asarray(stacked[0])[i] != np.asarray(alone[0])).mean() <= 0.01
        np.testing.assert_allclose(np.asarray(stacked[1])[i], np.asarray(alone[1]), rtol=2.0**-7)


@each_method
def test_statistics_are_asked_for(method):
    with pytest.raises(UserError, match=r"^learned rounding needs calibration text; give --calibration FILE, [^\n]*$"):
        QUANTIZERS[method].function(jnp.ones((32, 4)), None, QuantSpec(bits=3, group_size=32), options_of(method))


# One block

CONFIG = llama_config(blocks=1)
ROUTED = dataclasses.replace(
    CONFIG,
    kinds=(dataclasses.replace(CONFIG.kinds[0], routed=True),),
    experts=Experts(count=4, per_token=2, intermediate_size=96),
)
SPEC = QuantSpec(bits=2, group_size=32)
STEPS, BATCH = CHUNK + 10, 4


@functools.cache
def block(config=CONFIG, seed=0, samples=10):
    """Parameters in float32, inputs `[samples, 16, 64]` and the original outputs."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), random_params(config, seed)["block_0"])
    h = np.random.default_rng(seed).standard_normal((samples, 16, config.hidden_size)).astype(np.float32)
    return params, h, outputs(config, params, h)


def outputs(config, params, h):
    """Of the decoder's own block function."""
    return np.asarray(apply_block(config, config.kinds[0], params, h, context_for(jnp.zeros(h.shape[:2], jnp.int32))))


def with_codes(params, found, specs, residuals=None):
    """`params` with what was found in the place of the originals."""
    for path, codes in found.items():
        room, layer = path.split("/")
        kernel = QTensor.from_codes(*codes, specs[path], (residuals or {}).get(path)).dequantize()
        params = params | {room: params[room] | {layer: params[room][layer] | {"kernel": kernel}}}
    return params


def specs_of(config=CONFIG):
    return dict.fromkeys(block_matrices(config, config.kinds[0]), SPEC)


def learn(method, config=CONFIG, seed=None, block_seed=0, specs=None, on_steps=lambda done: None, **options):
    params, h, out = block(config, block_seed)
    options = options_of(method, **{"steps": STEPS, "batch_size": BATCH} | options)
    specs = specs or specs_of(config)
    function = BlockFunction(config, config.kinds[0])
    return QUANTIZERS[method].block(function, params, h, out, specs, options, seed, on_steps)


learn_once = functools.cache(learn)


def squared_error(config, found, specs, residuals=None):
    """Mean squared error of the block's output over all windows, in float64."""
    params, h, out = block(config)
    got = outputs(config, with_codes(params, found, specs, residuals), h)
    return np.square(got.astype(np.float64) - out.astype(np.float64)).mean()


@each_method
def test_a_block_is_reconstructed(method):
    found, how = learn_once(method)
    assert found.keys() == specs_of().keys()
    assert how.kept == "learned"
    assert how.losses.shape == (STEPS,)
    assert how.losses[0] == pytest.approx(1, rel=1e-4)  # of the start, over itself
    # The same arithmetic in another program: float32 sums of 64 to 128 products and a mean.
    assert how.after == pytest.approx(squared_error(CONFIG, found, specs_of()), rel=1e-4)
    assert how.after < how.before / 2
    params = block()[0]
    start = {
        path: rounded(params[path.split("/")[0]][path.split("/")[1]]["kernel"], SPEC, START[method]) for path in found
    }
    assert how.before == pytest.approx(squared_error(CONFIG, start, specs_of()), rel=1e-4)


@pytest.mark.long
def test_a_mixture_of_experts_is_reconstructed():
    found, how = learn("autoround", ROUTED)
    assert found["moe/up_proj"][0].shape == (4, 64, 96)
    assert "moe/router" not in found
    assert how.after == pytest.approx(squared_error(ROUTED, found, specs_of(ROUTED)), rel=1e-4)
    assert how.after < how.before / 2


def test_only_the_matrices_with_a_spec_are_touched_and_widths_may_differ():
    specs = {"mlp/up_proj": QuantSpec(bits=2, group_size=32), "attention/o_proj": QuantSpec(bits=4, group_size=64)}
    found, how = learn("autoround", specs=specs)
    assert found.keys() == specs.keys()
    assert int(found["attention/o_proj"][0].max()) == 15
    assert how.after == pytest.approx(squared_error(CONFIG, found, specs), rel=1e-4)


def test_the_target_is_what_is_aimed_at_whatever_comes_in():
    """Inputs behind quantized blocks are not those of the original: their error is made up for as far as it can be."""
    params, h, out = block()
    off = (h + 0.1 * np.random.default_rng(5).standard_normal(h.shape)).astype(np.float32)
    options = options_of("autoround", steps=STEPS, batch_size=BATCH)
    found, how = QUANTIZERS["autoround"].block(
        BlockFunction(CONFIG, CONFIG.kinds[0]), params, off, out, specs_of(), options
    )
    got = outputs(CONFIG, with_codes(params, found, specs_of()), off)
    assert how.after == pytest.approx(np.square(got.astype(np.float64) - out).mean(), rel=1e-4)
    assert how.after < how.before


@each_method
def test_learning_that_does_harm_falls_back_on_the_start(method):
    harmful = {"learning_rate": 50.0, "steps": 6}
    found, how = learn(method, **harmful)
    assert how.kept == "start"
    assert how.after == how.before
    assert_same(found["mlp/up_proj"], learn(method, steps=0)[0]["mlp/up_proj"])
    unguarded, worse = learn(method, guard=False, **harmful)
    assert worse.kept == "learned"
    assert worse.after > worse.before
    assert worse.after == pytest.approx(squared_error(CONFIG, unguarded, specs_of()), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "options"),
    [("adaquant", {}), ("flexround", {}), ("autoround", {"learning_rate": 50.0, "steps": 6})],
    ids=["adaquant, learned", "flexround, learned", "autoround, fallen back"],
)
def test_with_a_low_rank_residual_what_is_measured_is_what_is_stored(method, options):
    """The residual is fitted to the start, and rounding learned around it: the guard looks at both together."""
    specs = {path: dataclasses.replace(SPEC, rank=8) for path in specs_of()}
    found, how = learn(method, specs=specs, **options)
    assert how.kept == ("start" if options else "learned")
    assert how.after == pytest.approx(squared_error(CONFIG, found, specs, how.residuals), rel=1e-4)
    start, at_start = learn(method, specs=specs, steps=0)
    assert how.before == pytest.approx(squared_error(CONFIG, start, specs, at_start.residuals), rel=1e-4)
    assert how.before < learn(method, steps=0)[1].before, "the residual helps"
    assert how.after <= how.before * (1.0 if options else 0.6)
    params, path = block()[0], "mlp/up_proj"
    weight = params["mlp"]["up_proj"]["kernel"]
    plain = quantize_matrix(weight, None, specs[path], "rtn", start_options(method))
    ours, theirs = (left.dequantize() @ right.dequantize() for left, right in (how.residuals[path], plain.residual))
    np.testing.assert_allclose(ours, theirs, atol=0.03 * float(jnp.abs(theirs).max()))  # codes of 8 bits, ties apart


@pytest.mark.long
@pytest.mark.parametrize("method", ["autoround", "adaquant"])
def test_experts_that_are_held_stay_as_they_start(method):
    params, h, out = block(ROUTED)
    held = {path: np.asarray([True, False, True, False]) for path in specs_of(ROUTED) if path.startswith("moe")}
    function, specs = BlockFunction(ROUTED, ROUTED.kinds[0]), specs_of(ROUTED)
    options = options_of(method, steps=20, batch_size=BATCH)
    found, how = QUANTIZERS[method].block(function, params, h, out, specs, options, held=held)
    start, _ = QUANTIZERS[method].block(function, params, h, out, specs, dataclasses.replace(options, steps=0))
    assert how.kept == "learned"
    for path in held:
        changed = (np.asarray(found[path][0]) != np.asarray(start[path][0])).any((1, 2))
        np.testing.assert_array_equal(changed, [False, True, False, True])
        np.testing.assert_array_equal(found[path][1][::2], start[path][1][::2])


def test_what_is_not_a_number_falls_back_on_the_start():
    damaged = dataclasses.replace(
        AUTOROUND, project=lambda theta, fixed, options: jax.tree.map(lambda leaf: leaf * jnp.nan, theta)
    )
    params, h, out = block()
    found, how = reconstruct_block(
        damaged, BlockFunction(CONFIG, CONFIG.kinds[0]), params, h, out, specs_of(), options_of("autoround", steps=2)
    )
    assert how.kept == "start"
    assert np.isfinite(how.after)
    assert all(np.isfinite(np.asarray(scales)).all() for _, scales, _ in found.values())


def test_the_step_of_least_loss_or_the_last_one():
    """Where every step sees all windows, the loss of a step is the error over all."""
    _, best = learn("autoround", keep="best", batch_size=10, learning_rate=0.2)
    # Two programs compute it, from codes and from theta.
    assert best.after == pytest.approx(float(best.losses.min()) * best.before, rel=1e-4)
    _, last = learn("autoround", keep="last", batch_size=10, learning_rate=0.2)
    np.testing.assert_allclose(last.losses, best.losses, rtol=1e-4)
    assert last.after != best.after


@each_method
def test_the_same_seed_gives_the_same_codes_and_another_others(method):
    first, again, other = (learn(method, seed=seed)[0] for seed in (3, 3, 4))
    for path in first:
        assert_same(first[path], again[path])
    assert any((np.asarray(first[path][0]) != np.asarray(other[path][0])).any() for path in first)
    assert_same(learn(method, seed=None)[0]["mlp/up_proj"], learn_once(method)[0]["mlp/up_proj"])


def test_blocks_of_one_kind_compile_once():
    """Another block, other windows, another seed, and a last chunk that is shorter: one program."""
    jitted = ("_start", "_begin", "_measured", "_advance")
    jax.clear_caches()
    for name in jitted:
        getattr(reconstruct, name).clear_cache()
    for block_seed in range(3):
        learn("autoround", block_seed=block_seed, seed=block_seed, guard=block_seed != 1)
    assert {name: getattr(reconstruct, name)._cache_size() for name in jitted} == dict.fromkeys(jitted, 1)


def test_progress_is_told():
    told = []
    learn("autoround", on_steps=told.append)
    assert told == [0, CHUNK, STEPS]


def test_states_of_sixteen_bits():
    params, h, out = block()
    options = options_of("autoround", steps=20, batch_size=BATCH)
    low = (jnp.asarray(array, jnp.bfloat16) for array in (h, out))
    _, how = QUANTIZERS["autoround"].block(BlockFunction(CONFIG, CONFIG.kinds[0]), params, *low, specs_of(), options)
    assert how.after < how.before


def test_inputs_without_their_targets_are_refused():
    params, h, out = block()
    with pytest.raises(ValueError, match=r"inputs .* and targets"):
        QUANTIZERS["autoround"].block(
            BlockFunction(CONFIG, CONFIG.kinds[0]), params, h, out[1:], specs_of(), options_of("autoround")
        )


# Windows and options


@pytest.mark.long
def test_columns_over_eight_devices():
    script = Path(__file__).parent / "sharded_learned.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"


def test_windows_are_drawn_in_shuffled_passes():
    drawn = drawn_windows(samples=10, batch_size=4, steps=25, seed=0)
    assert drawn.shape == (25, 4)
    for start in range(0, 100, 10):
        assert sorted(drawn.ravel()[start : start + 10]) == list(range(10))
    np.testing.assert_array_equal(drawn, drawn_windows(10, 4, 25, 0))
    assert (drawn != drawn_windows(10, 4, 25, 1)).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": -1}, "autoround: option steps: -1; write 0 or more"),
        ({"batch_size": 0}, "autoround: option batch_size: 0; write 1 or more"),
        ({"seed": -2}, "autoround: option seed: -2; write 0 or more"),
        (
            {"learning_rate": float("nan")},
            "autoround: option learning_rate: nan; write a number above 0, or null for the method's own",
        ),
        (
            {"learning_rate": 0.0},
            "autoround: option learning_rate: 0.0; write a number above 0, or null for the method's own",
        ),
        ({"start": "rtn"}, "quantizer autoround: option start: 'rtn' is not one of minmax, mse or null"),
        ({"unit": "layer"}, "quantizer autoround: option unit: 'layer' is not one of block, matrix"),
        *(
            (
                {"unit": "matrix", name: value},
                f"autoround: option {name}: {value}, but with unit: matrix every step sees all tokens, and the best is "
                "kept; leave it out",
            )
            for name, value in {"batch_size": 4, "seed": 1, "keep": "best", "guard": False}.items()
        ),
    ],
)
def test_options_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError) as refused:
        options_of("autoround", **given)
    assert str(refused.value) == message
