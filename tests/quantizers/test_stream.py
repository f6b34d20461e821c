"""The driver: which states a block is calibrated on, in which order, and that it can be left and taken up again."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.calibration.statistics import reduce_inputs
from lq.calibration.stream import embed_batches, through_block
from lq.calibration.taps import input_statistics
from lq.errors import UserError
from lq.models.config import Experts
from lq.models.matrices import EMBEDDING, HEAD, matrices, model_shapes
from lq.models.source import InMemory
from lq.numerics.segmented import is_packed
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, QuantizedStream, Recipe, described, quantized_source
from lq.quantizers.apply import finite, quantize_matrix, read_matrix
from lq.quantizers.block import dense
from lq.quantizers.registry import SCALINGS

pytestmark = pytest.mark.once

CONFIG = llama_config(blocks=3)
ROUTED = dataclasses.replace(
    CONFIG,
    kinds=(dataclasses.replace(CONFIG.kinds[0], routed=True),) * 2,
    experts=Experts(count=4, per_token=2, intermediate_size=96),
)
CALIBRATED = [n for n, method in QUANTIZERS.items() if "calibration" in method.needs and method.segments is None]
FEW_STEPS = {"steps": 4, "batch_size": 2}  # of methods that learn


def tokens(count=6, length=48, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (count, length), np.int32)


def windows(rows=None):
    return Windows(tokens() if rows is None else rows, "random", "random tokens")


def recipe(method, **fields):
    known = {field.name for field in dataclasses.fields(QUANTIZERS[method].options)}
    options = {key: value for key, value in FEW_STEPS.items() if key in known}
    return Recipe(method=method, **({"options": QUANTIZERS.options(method, options)} | fields))


def specs_of(config, bits=3, **fields):
    return dict.fromkeys(matrices(config), QuantSpec(bits=bits, group_size=32, **fields))


def stream_of(method, config=CONFIG, params=None, specs=None, rows=None, **fields):
    params = random_params(config) if params is None else params
    return QuantizedStream(
        InMemory(config, params), specs or specs_of(config), recipe(method, **fields), windows(rows), batch_size=2
    )


def packed_leaves(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat if is_packed(leaf)}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "mixture"])
def test_every_method_packs_every_matrix(method, config):
    source = stream_of(method, config)
    params = source.params()
    assert set(packed_leaves(params)) == {f"{path}/kernel" for path in matrices(config)}
    for path, leaf in packed_leaves(params).items():
        spec = specs_of(config)[path.removesuffix("/kernel")]
        assert (leaf.spec, leaf.shape) == (spec, model_shapes(config)[path.removesuffix("/kernel")])
    original = random_params(config)
    for name in ("embed", "head"):
        assert_same(params[name], original[name])


def test_widths_of_their_own_for_runs_of_channels():
    config = llama_config(blocks=1, hidden=256)
    specs = specs_of(config, mixed=True)
    source = stream_of("baq", config, specs=specs, options=QUANTIZERS.options("baq", {"guard": False}))
    packed = packed_leaves(source.params())
    for path, leaf in packed.items():
        path = path.removesuffix("/kernel")
        assert 8 * leaf.nbytes == specs[path].size_bits(leaf.shape), path
    assert sum(packed["block_0/mlp/down_proj/kernel"].widths) == 3 * 4
    assert any(len(set(leaf.widths)) > 1 for leaf in packed.values()), "the random block has channels of unequal energy"


def test_widths_of_their_own_are_the_same_each_time():
    config = llama_config(blocks=1, hidden=256)
    first, second = (stream_of("baq", config, specs=specs_of(config, mixed=True)).block(0) for _ in range(2))
    assert_same(first, second)


def test_widths_of_their_own_need_a_method_and_specs_that_have_them():
    config = llama_config(blocks=1, hidden=256)
    with pytest.raises(UserError, match=r"baq: chooses widths for runs of channels.*write mixed: true"):
        stream_of("baq", config)
    with pytest.raises(UserError, match="mixed: gptq cannot choose widths for runs of channels; write method baq"):
        stream_of("gptq", config, specs=specs_of(config, mixed=True))


@pytest.mark.parametrize("method", CALIBRATED)
def test_goes_on_where_another_process_was(method):
    """From the states after any block the rest comes out the same to the bit."""
    whole = stream_of(method)
    expected = whole.params()
    for done in range(1, CONFIG.num_blocks):
        first, second = stream_of(method), stream_of(method)
        for i in range(done):
            first.block(i)
        second.restore(first.chains())
        for i in range(done, CONFIG.num_blocks):
            assert_same(second.block(i), expected[f"block_{i}"])


@pytest.mark.parametrize("method", CALIBRATED)
def test_identical_seeds_give_identical_codes_and_parts_may_be_asked_for_in_any_order(method):
    first, second = stream_of(method), stream_of(method)
    expected = first.params()
    assert_same(second.block(2), expected["block_2"])  # computes those before it
    assert_same(second.block(0), expected["block_0"])  # starts over
    assert_same(second.embed(), expected["embed"])


def test_a_propagating_method_sees_what_the_quantized_blocks_let_through():
    source = stream_of("gptq")
    packed = {f"block_{i}": source.block(i) for i in range(2)}
    rows = [tokens()[i : i + 2] for i in range(0, 6, 2)]
    h = embed_batches(InMemory(CONFIG, random_params(CONFIG)), tokens(), 2)
    for i in range(2):
        h = through_block(CONFIG, CONFIG.kinds[i], dense(packed[f"block_{i}"]), rows, h)
    for ours, theirs in zip(source.chains().states, h, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "propagated"),
    [
        ({"method": "gptq", "options": QUANTIZERS.options("gptq", {"propagate": False})}, False),
        ({"method": "gptq", "propagate": False}, False),
        ({"method": "rtn", "scaling": "awq"}, False),
        ({"method": "rtn", "scaling": "awq", "propagate": True}, True),
        ({"method": "awq", "propagate": True}, True),
    ],
    ids=str,
)
def test_whether_it_sees_the_original_states_or_the_quantized_ones(fields, propagated):
    params, said, chosen = random_params(CONFIG), [], Recipe(**fields)
    original = InMemory(CONFIG, params)
    source = QuantizedStream(original, specs_of(CONFIG), chosen, windows(), batch_size=2, note=said.append)
    blocks = [source.block(i) for i in range(2)] if propagated else [params[f"block_{i}"] for i in range(2)]
    if not propagated:
        source.block(1)
    rows = [tokens()[i : i + 2] for i in range(0, 6, 2)]
    h = embed_batches(original, tokens(), 2)
    for i in range(2):
        h = through_block(CONFIG, CONFIG.kinds[i], dense(blocks[i]), rows, h)
    for ours, theirs in zip(source.chains().states, h, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    states = "what the quantized blocks before it let through" if propagated else "the original's states"
    setting = f"propagate: {str(propagated).lower()}"
    assert said[:1] == [f"{chosen.name}: every block is calibrated on {states} ({setting})"]
    assert chosen.to_dict()["propagate"] is propagated


@pytest.mark.parametrize("true_sequential", [True, False])
def test_true_sequential_order_inside_the_block(true_sequential):
    """down_proj is calibrated on what the quantized gate and up let through, or on what the original ones do."""
    params = random_params(CONFIG)
    options = QUANTIZERS.options("gptq", {"true_sequential": true_sequential})
    chosen = Recipe(method="gptq", options=options)
    specs = specs_of(CONFIG)
    source = QuantizedStream(InMemory(CONFIG, params), specs, chosen, windows(), batch_size=2)
    packed = source.block(0)
    before = dense(packed if true_sequential else params["block_0"])
    before["mlp"]["down_proj"]["kernel"] = jnp.asarray(params["block_0"]["mlp"]["down_proj"]["kernel"], jnp.float32)
    total = None
    h = embed_batches(InMemory(CONFIG, params), tokens(), 2)
    for i, states in enumerate(h):
        rows = tokens()[2 * i : 2 * i + 2]
        found = input_statistics(CONFIG, CONFIG.kinds[0], before, states, rows, None, (3,), frozenset({"hessian"}))[0]
        total = found if total is None else total + found
    weight = params["block_0"]["mlp"]["down_proj"]["kernel"]
    prepared = QUANTIZERS["gptq"].prepare(total, options)
    expected = quantize_matrix(weight, prepared, specs["block_0/mlp/down_proj"], "gptq", options)
    got = packed["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(np.asarray(got.codes()), np.asarray(expected.codes()))


def test_compiles_once_per_shape_and_not_per_block():
    jax.clear_caches()
    quantize_matrix.clear_cache()
    input_statistics.clear_cache()
    stream_of("gptq").params()
    # q and o are 64 x 64, k and v 64 x 32, gate and up 64 x 128, down 128 x 64; four stages of statistics.
    assert quantize_matrix._cache_size() == 4
    assert input_statistics._cache_size() == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_embedding_and_head(method, tied):
    config = llama_config(blocks=2, tied=tied)
    params = random_params(config)
    tables = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    specs = specs_of(config) | dict.fromkeys(tables, QuantSpec(bits=4, group_size=32))
    source = quantized_source(InMemory(config, params), specs, recipe(method), windows(), batch_size=2)
    packed = source.params()
    assert set(packed_leaves({k: packed[k] for k in ("embed", "head")})) == {
        "embed/tokens/embedding", *([] if tied else ["head/kernel"])
    }  # fmt: skip
    table = read_matrix(packed["embed"], EMBEDDING)
    error = np.asarray(table.dequantize()).T - np.asarray(params["embed"]["tokens"]["embedding"], np.float32)
    assert (
        np.square(error).mean()
        < 0.02 * np.square(np.asarray(params["embed"]["tokens"]["embedding"], np.float32)).mean()
    )
    if method == "gptq" and not tied:
        # A lookup reads all channels alike: the second moment is the identity, where GPTQ is plain rounding.
        alone = quantize_matrix(
            read_matrix(params["embed"], EMBEDDING),
            reduce_inputs(jnp.eye(64), frozenset({"hessian"})),
            specs[EMBEDDING],
            "gptq",
            QUANTIZERS.options("gptq", {}),
        )
        np.testing.assert_array_equal(np.asarray(table.codes()), np.asarray(alone.codes()))


FILLED = "what they lack is filled up from all experts"
SCALED = "their channel scales are found with the tokens of all"
HELD = "they are not learned, but keep their start"
SMOOTH_ALL = {"scaling": "smoothquant", "scaling_options": SCALINGS.options("smoothquant", {"lines": "all"})}
BY_MATRIX = {"options": QUANTIZERS.options("autoround", {"unit": "matrix", "steps": 4})}
BY_IMPORTANCE = {"options": QUANTIZERS.options("rtn", {"clip": "opt", "importance": True})}
BOTH = ["moe/down_proj", "moe/gate_proj"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "fields", "told"),
    [
        ("gptq", {}, [(path, FILLED) for path in BOTH]),
        ("rsq", {}, [(path, FILLED) for path in BOTH]),
        ("awq", {}, [(BOTH[0], SCALED), *((path, FILLED) for path in BOTH)]),
        ("autoround", {}, [(path, HELD) for path in BOTH]),
        ("autoround", BY_MATRIX, [(path, FILLED) for path in BOTH]),
        ("rtn", {"scaling": "awq"}, [(BOTH[0], SCALED)]),
        ("rtn", {"scaling": "smoothquant"}, []),  # after norms alone, where experts have no scale of their own
        ("rtn", SMOOTH_ALL, [(BOTH[0], SCALED)]),
        ("rtn", BY_IMPORTANCE, [(path, FILLED) for path in BOTH]),
    ],
    ids=str,
)
def test_what_is_done_for_experts_with_few_tokens_is_told(method, fields, told):
    """Of twenty tokens, each of which goes to two experts. What is counted are tokens, whatever they weigh."""
    said, few = [], windows(tokens(count=1, length=20))
    source = InMemory(ROUTED, random_params(ROUTED))
    stream = QuantizedStream(source, specs_of(ROUTED), recipe(method, **fields), few, batch_size=2, note=said.append)
    packed = stream.block(0)
    assert all(bool(finite(leaf)) for leaf in jax.tree.leaves(packed) if leaf.dtype == jnp.bfloat16)
    line = re.compile(
        r"block_0/(.*): (\d) of 4 experts saw fewer than (\d+) tokens \(least (\d+)\); (.*)\. More .* helps"
    )
    found = [line.fullmatch(one).groups() for one in said if "experts" in one]
    assert sorted((path, what) for path, _, _, _, what in found) == sorted(told)
    for path, few, enough, least, _ in found:
        assert int(enough) == {"moe/gate_proj": 64, "moe/down_proj": 96}[path]
        assert int(few) == 4
        assert 0 <= int(least) <= 10, "of 40 rows"


def test_experts_that_saw_too_few_tokens_to_learn_from_keep_their_start():
    """Those of one window of 20 tokens do; of eight of 48 they are learned."""

    def stacks(rows, steps):
        options = QUANTIZERS.options("autoround", {"steps": steps, "batch_size": 1})
        packed = stream_of("autoround", ROUTED, rows=rows, options=options).block(0)
        return [np.asarray(packed["moe"][name]["kernel"].codes()) for name in ("gate_proj", "up_proj", "down_proj")]

    for rows, learns in ((tokens(count=1, length=20), False), (tokens(count=12), True)):
        changed = [(a != b).any() for a, b in zip(stacks(rows, 20), stacks(rows, 0), strict=True)]
        assert changed == [learns] * 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_a_final_norm_that_is_not_finite_is_named(method, tied):
    """What the head's matrix is applied to is looked at, as what those of the blocks are."""
    config = llama_config(blocks=1, tied=tied)
    params, table = random_params(config), EMBEDDING if tied else HEAD
    params["head"]["final_norm"]["scale"] = jnp.full((64,), jnp.nan, jnp.bfloat16)
    source = stream_of(method, config, params, {table: QuantSpec(bits=4, group_size=32)})
    with pytest.raises(UserError, match=rf"^{table}: its calibration inputs are NaN or infinite; the model or"):
        source.params()


def test_a_second_moment_of_the_head_that_needs_damping_is_told():
    config, said = llama_config(blocks=1, tied=False), []
    few, options = windows(tokens(count=1, length=20)), QUANTIZERS.options("gptq", {"damping": 0.0})
    source = InMemory(config, random_params(config))
    specs = {HEAD: QuantSpec(bits=4, group_size=32)}
    QuantizedStream(source, specs, recipe("gptq", options=options), few, batch_size=2, note=said.append).head()
    assert any(line.startswith("head: a Hessian was not positive definite; damped by") for line in said)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_error_of_a_table_is_reported_as_that_of_a_matrix(tied):
    config = llama_config(blocks=1, tied=tied)
    tables = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    source = stream_of("gptq", config, specs=dict.fromkeys(tables, QuantSpec(bits=4, group_size=32)))
    source.params()
    for table in tables:
        assert 0 < source.report[table]["output error"] < 0.05
        assert described(source, table.split("/")[0]).endswith("% output error")


@pytest.mark.parametrize("group_size", [128, None])
def test_a_wide_embedding_is_clipped_by_all_of_its_channels(group_size):
    """Of 1024 channels, where a sample has 512 rows: no range is cut for nothing, so that the weights gain by it."""
    config, errors = dataclasses.replace(llama_config(1, 1024, tied=False), vocab_size=256), {}
    table = np.random.default_rng(0).standard_t(4, (256, 1024)).astype(np.float32)
    source = InMemory(config, {"embed": {"tokens": {"embedding": jnp.asarray(table)}}})
    specs, text = {EMBEDDING: QuantSpec(bits=4, group_size=group_size)}, windows(tokens() % 256)
    for clip in (False, True):
        chosen = Recipe(method="awq", options=QUANTIZERS.options("awq", {"scale": False, "clip": clip}))
        packed = QuantizedStream(source, specs, chosen, text, batch_size=2).embed()
        errors[clip] = np.square(np.asarray(read_matrix(packed, EMBEDDING).dequantize()).T - table).mean()
    assert errors[True] < errors[False]


def test_what_is_not_finite_is_named():
    params = random_params(CONFIG)
    params["block_1"]["attention"]["o_proj"]["kernel"] = jnp.full((64, 64), jnp.nan, jnp.bfloat16)
    with pytest.raises(UserError, match=r"^block_1/attention/o_proj: a weight is NaN or infinite"):
        stream_of("gptq", params=params).params()
    params = random_params(CONFIG)
    params["block_1"]["attention_norm"]["scale"] = jnp.full((64,), jnp.inf, jnp.bfloat16)
    with pytest.raises(UserError, match=r"^block_1/attention/q_proj: its calibration inputs are NaN or infinite"):
        stream_of("gptq", params=params).params()


@pytest.mark.parametrize("method", CALIBRATED)
def test_states_that_are_not_finite_are_refused(method):
    params = random_params(CONFIG)
    params["block_1"]["attention_norm"]["scale"] = jnp.full((64,), jnp.nan, jnp.bfloat16)
    with pytest.raises(UserError, match=r"^block_1[^\n]*(NaN|infinite)"):
        stream_of(method, params=params).params()


@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_a_block_without_specs_stays_as_it_is(method):
    params = random_params(CONFIG)
    specs = {path: spec for path, spec in specs_of(CONFIG).items() if not path.startswith("block_1")}
    packed = stream_of(method, params=params, specs=specs).params()
    assert_same(packed["block_1"], params["block_1"])
    assert packed_leaves({"block_2": packed["block_2"]})


def test_zero_weights_and_inputs_are_harmless():
    """A dead block: its norm lets nothing through, and its weights are zero."""
    params = random_params(CONFIG)
    params["block_0"]["mlp_norm"]["scale"] = jnp.zeros((64,), jnp.bfloat16)
    params["block_0"]["attention"]["o_proj"]["kernel"] = jnp.zeros((64, 64), jnp.bfloat16)
    for method in CALIBRATED:
        packed = stream_of(method, params=params).block(0)
        # A group without a range gets one of 1e-5; what learns may use its codes.
        assert np.abs(np.asarray(packed["attention"]["o_proj"]["kernel"].dequantize())).max() <= 1e-4
        assert all(np.isfinite(np.asarray(leaf.dequantize())).all() for leaf in packed_leaves(packed).values())


def test_a_recipe_that_needs_text_asks_for_it():
    with pytest.raises(UserError, match=r"gptq needs calibration text; give --calibration FILE"):
        quantized_source(InMemory(CONFIG, random_params(CONFIG)), specs_of(CONFIG), recipe("gptq"))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_channel_scales_go_before_any_quantizer(scaling, method):
    """At 8 bits the block still does what it did, with other norms."""
    params = random_params(CONFIG)
    source = stream_of(method, params=params, specs=specs_of(CONFIG, bits=8), scaling=scaling)
    packed = source.block(0)
    gains = np.asarray(packed["attention_norm"]["scale"], np.float32)
    assert not np.allclose(gains, np.asarray(params["block_0"]["attention_norm"]["scale"], np.float32), rtol=1e-3)
    rows = [tokens()[:2]]
    h = embed_batches(InMemory(CONFIG, params), tokens()[:2], 2)
    before = through_block(CONFIG, CONFIG.kinds[0], dense(params["block_0"]), rows, h)[0]
    after = through_block(CONFIG, CONFIG.kinds[0], dense(packed), rows, h)[0]
    assert np.abs(after - before).max() <= 0.02 * np.abs(before).max()
