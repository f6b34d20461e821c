"""Output errors of modules: float64 outputs of the decoder's own blocks, with original and with quantized weights."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.calibration.calls import calls_in_block
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.kurtosis import spikes
from lq.importance.output_mse import module_of
from lq.importance.units import units_in, units_of
from lq.models.context import context_for
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.quantizers.apply import read_matrix, with_matrix
from lq.quantizers.rtn import RTNOptions

pytestmark = pytest.mark.once

TOKENS = np.random.default_rng(0).integers(1, 90, (5, 16), np.int32)
WINDOWS = Windows(TOKENS, "random", "random")
FORMAT = {"bits": [4, 2], "group_size": 32, "batch_size": 2, "options": {"clip": "none"}}
RECIPE = Recipe(options=RTNOptions(clip="none"))
SPECS = [QuantSpec(bits=bits, group_size=32) for bits in (2, 4)]


@pytest.fixture(scope="module", params=["llama", "mixtral", "opt"])
def source(request):
    config = llama_config(2) if request.param == "llama" else config_of(request.param)
    return InMemory(config, random_params(config, dtype=jnp.float32))


@pytest.fixture(scope="module")
def llama():
    config = llama_config(2)
    return InMemory(config, random_params(config, dtype=jnp.float32))


def quantized_block(source, index, paths, spec):
    """A block with these of its matrices as rounding leaves them; NumPy."""
    model = PlannedSource(source, dict.fromkeys(matrices(source.config), spec), RECIPE)
    block, rounded = jax.tree.map(np.asarray, source.block(index)), model.block(index)
    for path in paths:
        block = with_matrix(block, path, np.asarray(read_matrix(rounded, path).dequantize()))
    return block


def silenced(block):
    """Without what its feed-forward part writes."""
    part = "moe" if "moe" in block else "mlp"
    return {**block, part: {**block[part], "down_proj": jax.tree.map(np.zeros_like, block[part]["down_proj"])}}


@pytest.mark.parametrize("unit", ["group", "part", "block"])
def test_errors_of_modules_are_those_of_float64(source, unit):
    """What attention adds is what is left of a block whose feed-forward part is silent; the rest are whole blocks."""
    found = score(source, "output_mse", WINDOWS, {**FORMAT, "unit": unit})
    h = by_hand.states(source, TOKENS)
    for index in range(source.config.num_blocks):
        for name, paths in units_in(units_of(source.config, unit), index).items():
            prepare = silenced if name.split("/")[1:2] == ["attention"] else lambda block: block
            before = by_hand.block_output(
                source, TOKENS, index, prepare(quantized_block(source, index, [], SPECS[0])), h[index]
            )
            for spec in SPECS:
                block = prepare(quantized_block(source, index, paths, spec))
                error = np.square(by_hand.block_output(source, TOKENS, index, block, h[index]) - before).mean()
                # Outputs are sums of 64 products in float32, of at most ten times the difference that is squared.
                assert found.costs[name][str(spec)] == pytest.approx(error, rel=1e-3)
            assert found.values[name] == found.costs[name]["int2-g32"]


def product(args, weight):
    """x W in NumPy; of experts, whose rows are sorted, each run of rows with its own."""
    x = np.asarray(args[0], np.float64)
    if weight.ndim == 2:
        return x @ weight
    runs = np.split(x, np.cumsum(np.asarray(args[1]))[:-1])
    return np.concatenate([rows @ one for rows, one in zip(runs, weight, strict=True)])


@pytest.mark.parametrize("normalize", ["none", "absolute", "energy"])
@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_errors_of_matrices_are_those_of_float64(case, normalize):
    config = llama_config(2) if case == "llama" else config_of(case)
    source = InMemory(config, random_params(config, dtype=jnp.float32))
    found = score(source, "output_mse", WINDOWS, {**FORMAT, "normalize": normalize})
    h, index = by_hand.states(source, TOKENS), 1
    paths = [path for path in matrices(config) if path.startswith(f"block_{index}/")]
    with jax.enable_x64(True):
        params, state, context = by_hand.wide(source.block(index)), jnp.asarray(h[index]), context_for(TOKENS)
        within = {path.split("/", 1)[1]: "__call__" for path in paths}
        calls = calls_in_block(config, config.kinds[index], params, state, context, within)
    for path in paths:
        args = calls[path.split("/", 1)[1]].args
        weight = np.asarray(read_matrix(source.block(index), path), np.float64)
        output = product(args, weight)
        norm = {"none": 1.0, "absolute": np.abs(output).mean(), "energy": np.square(output).mean()}[normalize]
        for spec in SPECS:
            block = quantized_block(source, index, [path], spec)
            error = np.square(product(args, read_matrix(block, path) - weight)).mean()
            # States are known to 64 * 2^-24 or so in float32, differences of outputs to ten times that, and squared.
            assert found.costs[path][str(spec)] == pytest.approx(error / norm, rel=1e-3)


def test_the_module_of_a_unit():
    assert module_of("block_3/mlp/gate_proj+up_proj", "group") == "mlp"
    assert module_of("block_3/attention/o_proj", "group") == "attention"
    assert module_of("block_3/attention/o_proj", "matrix") == "attention/o_proj"
    assert module_of("block_3/moe", "part") == "moe"
    assert module_of("block_3", "block") == ""


def test_weights_that_are_on_the_grid_lose_nothing(llama):
    specs = dict.fromkeys(matrices(llama.config), QuantSpec(bits=2, group_size=32, symmetric=True))
    rounded = PlannedSource(llama, specs, RECIPE)

    def on_the_grid(index, block):
        for path in matrices(llama.config):
            if path.startswith(f"block_{index}/"):
                block = with_matrix(block, path, read_matrix(rounded.block(index), path).dequantize())
        return block

    changed = by_hand.with_blocks(llama, on_the_grid)
    again = PlannedSource(changed, specs, RECIPE)
    kept = [
        path
        for path in matrices(llama.config)
        for index in [int(path.split("/")[0].removeprefix("block_"))]
        if np.array_equal(read_matrix(again.block(index), path).dequantize(), read_matrix(changed.block(index), path))
    ]
    assert kept, "of rounding twice the second may change nothing"
    found = score(changed, "output_mse", WINDOWS, {"bits": [2], "group_size": 32, "symmetric": True})
    assert {path for path, value in found.values.items() if value == 0.0} == set(kept)


def test_spikes_are_looked_for_along_the_depth():
    config = llama_config(5)
    source = InMemory(config, random_params(config, dtype=jnp.float32))

    def spoiled(index, block):
        return with_matrix(block, "block_3/mlp/up_proj", 8 * block["mlp"]["up_proj"]["kernel"]) if index == 3 else block

    changed = by_hand.with_blocks(source, spoiled)
    values, jumps = (score(changed, "output_mse", WINDOWS, {**FORMAT, "rule": rule}) for rule in ("value", "spike"))
    assert jumps.costs == values.costs
    for kind in {path.split("/", 1)[1] for path in values.values}:
        series = np.array([values.values[f"block_{i}/{kind}"] for i in range(5)])
        np.testing.assert_array_equal([jumps.values[f"block_{i}/{kind}"] for i in range(5)], spikes(series))
    up = [jumps.values[f"block_{i}/mlp/up_proj"] for i in range(5)]
    assert int(np.argmax(up)) == 3


@pytest.mark.parametrize("which", [0, 1])
def test_a_block_that_writes_more_is_first(llama, which):
    changed = by_hand.planted(llama, which)
    for unit in ("block", "part"):
        found = score(changed, "output_mse", WINDOWS, {**FORMAT, "unit": unit})
        assert found.ranking()[0].startswith(f"block_{which}")


def test_what_it_took(llama):
    """The model as it is, and of every part one run and one for each option."""
    passes = score(llama, "output_mse", WINDOWS, {**FORMAT, "unit": "part"}).passes
    assert passes == pytest.approx(1 + 2 * (1 + 2))


def test_a_calibrated_quantizer(llama):
    """GPTQ makes its matrices' outputs better than rounding does, which is what it is for."""
    rounded, better = (
        score(llama, "output_mse", WINDOWS, {**FORMAT, "bits": [3], "method": method}).values
        for method in ("rtn", "gptq")
    )
    assert sum(better.values()) < sum(rounded.values())


def test_a_rule_that_is_none():
    with pytest.raises(UserError, match=r"^metric output_mse: option rule: 'jump' is not one of value, spike$"):
        METRICS.options("output_mse", {"rule": "jump"})
