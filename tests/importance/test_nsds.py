"""NSDS: its formulas in float64 NumPy with dense circuits, for every kind of block; scales, and soft "or"s."""

import dataclasses

import by_hand
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

from lq.errors import UserError
from lq.importance import METRICS, score
from lq.importance.nsds import concentration, excess_kurtosis, mad_sigmoid, main, soft_or
from lq.models.config import Rotation
from lq.models.matrices import HEAD
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe

pytestmark = pytest.mark.once

CASES = ["llama", "mixtral, untied", "gpt2", "opt, untied", "gemma2", "mistral of 6 heads"]


def model(case):
    config = llama_config(4) if case == "llama" else config_of(case)
    return InMemory(config, random_params(config, dtype=jnp.float32))


def kurtosis(x, axis=None):
    x = x - x.mean(axis, keepdims=True)
    return (x**4).mean(axis) / (x**2).mean(axis) ** 2 - 3


def kept(s):
    return int(np.argmax(np.cumsum(s**2) / (s**2).sum() >= 0.99)) + 1


def sensitivity(s, beta):
    s = s[: len(beta)] * beta
    p = s[s > 0] / s.sum()
    return s.sum() / np.exp(-(p * np.log(p)).sum()) if s.sum() > 0 else 0.0


def by_the_formulas(source):
    """NV and SE of every module of every block, in the paper's orientation [out, in], circuits dense [D, D]."""
    config = source.config
    table = np.asarray(source.embed()["tokens"]["embedding"], np.float64)
    unembedding = table if config.tie_embeddings else np.asarray(source.head()["kernel"], np.float64).T
    _, s, vt = np.linalg.svd(unembedding, full_matrices=False)
    audible = vt[: kept(s)].T
    projector = audible @ audible.T

    def module(w, kind):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        r = kept(s)
        u, v = u[:, :r], vt[:r].T
        if kind == "reads":
            beta = np.log(1 + np.maximum(kurtosis(v, 0), 0))
        elif kind == "compares":
            beta = np.log(1 + np.maximum(kurtosis(u, 0), 0) * np.maximum(kurtosis(v, 0), 0))
        else:
            beta = np.linalg.norm(projector @ u, axis=0)
        return kurtosis(w), sensitivity(s, beta)

    found = {}
    H, C = config.num_heads, config.head_dim
    for index in range(config.num_blocks):
        block = source.block(index)
        part = "mlp" if "mlp" in block else "moe"
        for name, kind in (("up_proj", "reads"), ("gate_proj", "reads"), ("down_proj", "writes")):
            if name in block[part]:
                kernel = np.asarray(block[part][name]["kernel"], np.float64)
                stack = kernel if kernel.ndim > 2 else kernel[None]
                found[f"{part}/{name}", index] = np.mean([module(one.T, kind) for one in stack], 0)
        q, k, v, o = (np.asarray(block["attention"][f"{n}_proj"]["kernel"], np.float64).T for n in "qkvo")
        heads = {"QK": [], "OV": []}
        for h in range(H):
            g = h * config.num_kv_heads // H
            mine, shared = slice(h * C, (h + 1) * C), slice(g * C, (g + 1) * C)
            heads["QK"].append(module(q[mine].T @ k[shared], "compares"))
            heads["OV"].append(module(o[:, mine] @ v[shared], "writes"))
        for name, numbers in heads.items():
            found[name, index] = np.mean(numbers, 0)
    return found


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_scores_are_those_of_the_formulas(case):
    source = model(case)
    found, expected = score(source, "nsds"), by_the_formulas(source)
    modules = list(dict.fromkeys(name for name, _ in expected))
    assert set(found.extra["modules"]) == set(modules)
    for (name, index), numbers in expected.items():
        # Moments of products of float32 numbers, and vectors of singular values that lie apart by more than a part in
        # a hundred of the largest: known to 100 * 64 * 2^-24.
        assert found.extra["modules"][name][f"block_{index}"] == pytest.approx(numbers, rel=1e-3, abs=1e-3)
    blocks = range(source.config.num_blocks)
    parts = []
    for which in (0, 1):
        missing = []
        for name in modules:
            x = np.array([expected[name, index][which] for index in blocks])
            scale = np.median(np.abs(x - np.median(x)))
            missing.append(1 - 1 / (1 + np.exp(-(x - np.median(x)) / scale)))
        parts.append(1 - np.prod(np.array(missing) ** (1 / len(modules)), axis=0))
    values = 1 - np.sqrt((1 - parts[0]) * (1 - parts[1]))
    # The median distance divides: what the numbers are off by counts up to a hundred times.
    assert list(found.values.values()) == pytest.approx(values, abs=0.02)


def test_the_scale_along_the_depth():
    x = np.array([3.0, 1.0, 10.0, 4.0, 2.0])
    assert mad_sigmoid(x)[0] == 0.5, "the median"
    np.testing.assert_allclose(mad_sigmoid(x), 1 / (1 + np.exp(-(x - 3.0) / 1.0)), rtol=1e-12)
    np.testing.assert_allclose(mad_sigmoid(5 * x - 2), mad_sigmoid(x), rtol=1e-12)
    assert mad_sigmoid(np.array([1.0, 1.0, 1.0, 2.0, 0.0])).tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]
    assert mad_sigmoid(np.array([7.0])).tolist() == [0.5]


def test_soft_or_is_of_modules_and_not_of_blocks():
    of_modules = np.array([[0.5, 0.2, 0.9], [0.5, 0.4, 1.0]])
    np.testing.assert_allclose(soft_or(of_modules), [0.5, 1 - np.sqrt(0.8 * 0.6), 1.0], rtol=1e-12)
    np.testing.assert_allclose(soft_or([0.3, 0.3, 0.3]), 0.3, rtol=1e-12)


def test_one_direction_is_as_concentrated_as_can_be():
    one, ten = jnp.ones(10), jnp.asarray([10.0] + [0.0] * 9)
    assert concentration(one, jnp.ones(10), 1.0) == pytest.approx(1.0), "ten of ten, in effect ten directions"
    assert concentration(ten, jnp.ones(10), 1.0) == pytest.approx(10.0)
    assert concentration(one, jnp.zeros(10), 1.0) == 0.0, "of no weight at all"
    assert main(jnp.asarray([3.0, 1.0, 0.1]), 0.89) == 1
    assert main(jnp.asarray([3.0, 1.0, 0.1]), 0.9) == 2, "9 of 10.01 is less"
    assert float(excess_kurtosis(jnp.zeros((3, 3)))) == 0.0
    assert float(excess_kurtosis(jnp.asarray([1.0, -1.0]))) == -2.0


def test_the_size_of_all_weights_does_not_matter():
    source = model("llama")

    def scaled(index, block):
        return {
            part: {n: {"kernel": 4.0 * leaf["kernel"]} if "kernel" in leaf else leaf for n, leaf in tree.items()}
            if part in ("attention", "mlp")
            else tree
            for part, tree in block.items()
        }

    larger = score(by_hand.with_blocks(source, scaled), "nsds").values
    assert list(larger.values()) == pytest.approx(list(score(source, "nsds").values.values()), abs=1e-4)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_block_of_heavy_tails_is_first(which):
    rng = np.random.default_rng(0)

    def spoiled(index, block):
        if index != which:
            return block
        return {
            part: {
                n: {"kernel": jnp.asarray(0.1 * rng.standard_t(2.5, leaf["kernel"].shape), jnp.float32)}
                for n, leaf in tree.items()
            }
            if part in ("attention", "mlp")
            else tree
            for part, tree in block.items()
        }

    found = score(by_hand.with_blocks(model("llama"), spoiled), "nsds")
    assert found.ranking()[0] == f"block_{which}"


def test_models_that_it_cannot_read():
    source = model("llama")
    rotated = InMemory(dataclasses.replace(source.config, rotation=Rotation(seed=0, down=True)), source.params())
    with pytest.raises(UserError, match=r"^metric nsds: the model rotates its states as it runs; score the original"):
        score(rotated, "nsds")
    untied = model("opt, untied")
    packed = PlannedSource(untied, {HEAD: QuantSpec(bits=4, group_size=32)}, Recipe())
    with pytest.raises(UserError, match=r"^metric nsds: head is packed; score the original model$"):
        score(packed, "nsds")
    with pytest.raises(UserError, match=r"^energy: 0; write a share above 0 and up to 1, such as 0.99$"):
        METRICS.options("nsds", {"energy": 0})
