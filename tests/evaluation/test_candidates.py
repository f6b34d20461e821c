"""Choices among stacked options lose what the quantized model itself loses, and compile once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.evaluation import candidates as module
from lq.evaluation import evaluate, make_reference
from lq.evaluation.candidates import Candidates, Judge
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.quantizers.rtn import RTNOptions

pytestmark = pytest.mark.once

BITS = (2, 3, 4)
WINDOWS = Windows(np.random.default_rng(0).integers(1, 90, (5, 16), np.int32), "random", "random")


def planned(source, bits):
    """Every matrix at the width that `bits` says, or that it says of its path."""
    specs = {}
    for path in matrices(source.config):
        width = bits if isinstance(bits, int) else bits.get(path)
        if width is not None:
            specs[path] = QuantSpec(bits=width, group_size=32)
    return PlannedSource(source, specs, Recipe(options=RTNOptions(clip="none")))


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def source(request):
    config = llama_config(3) if request.param == "llama" else config_of(request.param)
    return InMemory(config, random_params(config))


@pytest.fixture(scope="module")
def judge(source):
    candidates = Candidates.of(source, [planned(source, bits) for bits in BITS])
    return Judge(candidates, WINDOWS, batch_size=2)


def test_a_choice_loses_what_its_plan_does(source, judge):
    reference = make_reference(source, WINDOWS, batch_size=2)
    rng = np.random.default_rng(1)
    choices = [dict.fromkeys(matrices(source.config), 1)]
    choices += [{path: int(rng.integers(0, 4)) for path in matrices(source.config)}]
    for choice in choices:
        widths = {path: BITS[option] for path, option in choice.items() if option < 3}
        expected = evaluate(planned(source, widths), WINDOWS, reference=reference, batch_size=2).kl
        got = judge.kl(choice)
        assert got.shape == (5,)
        # The same arithmetic, but for products with packed weights that sum in another order.
        assert got.mean() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_original_loses_nothing(judge):
    assert np.abs(judge.kl({})).max() < 1e-6


def test_log_probabilities_need_not_be_held(source, judge, monkeypatch):
    """A vocabulary too wide for it: the original's head is applied anew."""
    monkeypatch.setattr(module, "MOST_HELD", 0)
    choices, which = [dict.fromkeys(matrices(source.config), option) for option in (0, 2)], [3, 1, 4]
    again = Judge(judge.candidates, WINDOWS, batch_size=2)
    # Logits of some units in 24 bits; the sum over a window halves what is left of it.
    np.testing.assert_allclose(again.kl_of(choices, which), judge.kl_of(choices, which), rtol=1e-5, atol=1e-7)


def test_from_the_middle_it_is_the_same(source, judge):
    choice = {path: 0 for path in matrices(source.config) if path.startswith("block_1/")}
    states = judge.states(judge.inputs({}), 0, {}, until=1)
    np.testing.assert_array_equal(judge.kl_from(states, 1, choice), judge.kl(choice))


def test_several_choices_lose_what_each_does_alone(source, judge):
    """Whatever they share; of all windows, and of some in any order, which are other batches."""
    paths, rng = list(matrices(source.config)), np.random.default_rng(2)
    first = {path: int(rng.integers(0, 4)) for path in paths}
    others = [{**first, path: (first[path] + 1) % 4} for path in (paths[-1], paths[0], paths[len(paths) // 2])]
    choices = [first, *others, {}, first]
    alone = np.array([judge.kl(choice) for choice in choices])
    np.testing.assert_array_equal(judge.kl_of(choices), alone)
    np.testing.assert_allclose(judge.kl_of(choices, [4, 0, 1]), alone[:, [4, 0, 1]], rtol=1e-3, atol=1e-6)
    assert judge.kl_of([], [0]).shape == (0, 1)


def test_passes_are_counted(source):
    judge = Judge(Candidates.of(source, [planned(source, 2)]), WINDOWS, batch_size=2)
    assert judge.passes == pytest.approx(1.0), "the reference"
    judge.kl({})
    judge.kl_of([{}], [3, 0])
    judge.states(judge.inputs({}), 0, {}, until=1)
    blocks = source.config.num_blocks
    assert judge.passes == pytest.approx(2.0 + 2 / 5 + 1 / blocks)
    # One that differs in the last block alone computes that again; the same once more, nothing.
    last = {path: 0 for path in matrices(source.config) if path.startswith(f"block_{blocks - 1}/")}
    judge.passes = 0.0
    judge.kl_of([last, {}, last])
    assert judge.passes == pytest.approx(1.0 + 1 / blocks)


def test_compiles_once_for_a_kind_of_block(source, judge):
    jax.clear_caches()
    for option in range(4):
        judge.kl(dict.fromkeys(matrices(source.config), option))
    # Batches of two windows and of the one that is left.
    assert module._chosen_block._cache_size() == 2 * len(set(source.config.kinds))


def test_models_that_differ_in_more_than_matrices_are_refused():
    config = llama_config(1)
    source, params = InMemory(config, random_params(config)), random_params(config)
    norm = params["block_0"]["mlp_norm"]
    other = InMemory(config, {**params, "block_0": {**params["block_0"], "mlp_norm": {"scale": norm["scale"] * 2}}})
    with pytest.raises(UserError, match=r"^candidates: option 1 has other norms or biases in block_0"):
        Candidates.of(source, [planned(source, 2), planned(other, 2)])
    with pytest.raises(UserError, match=r"^candidates: option 0 has other norms"):
        Candidates.of(source, [planned(other, 2)])


def test_one_token_foretells_nothing(source):
    windows = Windows(WINDOWS.tokens[:, :1], "short.txt", "random")
    with pytest.raises(UserError, match=r"^short\.txt: windows of one token, which foretell none"):
        Judge(Candidates.of(source, [planned(source, 2)]), windows)


def test_choices_that_cannot_be():
    config = llama_config(1)
    source = InMemory(config, random_params(config))
    candidates = Candidates.of(source, [planned(source, 2)], jnp.bfloat16)
    for choice in ({"block_0/mlp/up": 0}, {"block_0/mlp/up_proj": 2}):
        with pytest.raises(ValueError, match="choice"):
            candidates.indices(choice)
