"""What calibration sees of a block's matrices, against a block written out in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.calibration.statistics import InputStats, reduce_inputs
from lq.calibration.taps import TILE, block_inputs, input_statistics, reduce_expert_inputs
from lq.models.config import Experts

ALL = frozenset({"hessian", "total", "absolute", "sample"})
CONFIG = llama_config(blocks=1)
KIND = CONFIG.kinds[0]
ROUTED = dataclasses.replace(
    CONFIG,
    kinds=(dataclasses.replace(KIND, routed=True),),
    experts=Experts(count=4, per_token=2, intermediate_size=96),
)


def inputs_by_definition(config, params, h):
    """Input of every matrix of a Llama block, `[B, S, K]`, float64; and the routing of a mixture."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    B, S, _ = h.shape
    C, H, G = config.head_dim, config.num_heads, config.num_kv_heads

    def norm(x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotated(x):
        frequency = config.kinds[0].rope.theta ** (-np.arange(0, C, 2) / C)
        angle = np.arange(S)[:, None, None] * frequency
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = norm(h, p["attention_norm"]["scale"])
    q, k, v = (x @ p["attention"][f"{n}_proj"]["kernel"] for n in "qkv")
    q, k, v = rotated(q.reshape(B, S, H, C)), rotated(k.reshape(B, S, G, C)), v.reshape(B, S, G, C)
    k, v = np.repeat(k, H // G, 2), np.repeat(v, H // G, 2)
    scores = np.einsum("bshc,bthc->bhst", q, k) * config.query_scale
    scores = np.where(np.tril(np.ones((S, S), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum("bhst,bthc->bshc", weights, v).reshape(B, S, H * C)
    h = h + o @ p["attention"]["o_proj"]["kernel"]
    y = norm(h, p["mlp_norm"]["scale"])
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    found = {"attention/q_proj": x, "attention/o_proj": o}
    if "moe" not in p:
        hidden = silu(y @ p["mlp"]["gate_proj"]["kernel"]) * (y @ p["mlp"]["up_proj"]["kernel"])
        return found | {"mlp/gate_proj": y, "mlp/down_proj": hidden}, None
    chosen = np.argsort(-(y @ p["moe"]["router"]["kernel"]), axis=-1)[..., : config.experts.per_token]
    per_expert = [y[(chosen == e).any(-1)] for e in range(config.experts.count)]
    gate, up = p["moe"]["gate_proj"]["kernel"], p["moe"]["up_proj"]["kernel"]
    hidden = [silu(rows @ gate[e]) * (rows @ up[e]) for e, rows in enumerate(per_expert)]
    return found | {"moe/gate_proj": per_expert, "moe/down_proj": hidden}, chosen


def states(batch=2, length=40):
    return np.random.default_rng(1).standard_normal((batch, length, CONFIG.hidden_size))


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "mixture"])
def test_matrices_that_read_one_tensor_are_one_input(config):
    found = [(one.readers, one.experts) for one in block_inputs(config, config.kinds[0])]
    part, experts = ("moe", 4) if config is ROUTED else ("mlp", None)
    assert found == [
        (("attention/q_proj", "attention/k_proj", "attention/v_proj"), None),
        (("attention/o_proj",), None),
        ((f"{part}/gate_proj", f"{part}/up_proj"), experts),
        ((f"{part}/down_proj",), experts),
    ]


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "mixture"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_over_the_true_inputs(config, weighted):
    kind, params, h = config.kinds[0], random_params(config, dtype=jnp.float32)["block_0"], states()
    expected, chosen = inputs_by_definition(config, params, h)
    weights = np.random.default_rng(2).uniform(0.1, 2, h.shape[:2]) if weighted else None
    given = None if weights is None else jnp.asarray(weights, jnp.float32)
    tokens = jnp.zeros(h.shape[:2], jnp.int32)
    measured = input_statistics(config, kind, params, jnp.asarray(h, jnp.float32), tokens, given, (0, 1, 2, 3), ALL)
    weights = np.ones(h.shape[:2]) if weights is None else weights
    for one, stats in zip(block_inputs(config, kind), measured, strict=True):
        truth = expected[one.readers[0]]
        each = [truth] if one.experts is None else truth
        masks = [slice(None)] if one.experts is None else [(chosen == e).any(-1) for e in range(4)]
        for e, (rows, mask) in enumerate(zip(each, masks, strict=True)):
            x, w = rows.reshape(-1, rows.shape[-1]), weights[mask].reshape(-1)
            got = stats if one.experts is None else jax.tree.map(lambda leaf, e=e: leaf[e], stats)
            # Inputs carry the rounding of a float32 block, some 1e-6 of their size; sums of positive terms keep it.
            size = (w[:, None] * x**2).sum()
            np.testing.assert_allclose(got.tokens, w.sum(), rtol=1e-6)
            np.testing.assert_allclose(got.hessian, (w[:, None] * x).T @ x, atol=5e-6 * size)
            np.testing.assert_allclose(got.absolute, (w[:, None] * np.abs(x)).sum(0), rtol=2e-5, atol=1e-5)
            scale = (w[:, None] * np.abs(x)).sum(0)
            np.testing.assert_array_less(np.abs(got.total - (w[:, None] * x).sum(0)), 2e-5 * scale + 1e-5)


def test_a_sample_holds_rows_of_the_input():
    params, h = random_params(CONFIG, dtype=jnp.float32)["block_0"], states()
    expected, _ = inputs_by_definition(CONFIG, params, h)
    tokens = jnp.zeros(h.shape[:2], jnp.int32)
    (stats,) = input_statistics(CONFIG, KIND, params, jnp.asarray(h, jnp.float32), tokens, None, (3,), ALL, rows=16)
    x = expected["mlp/down_proj"].reshape(80, -1)
    np.testing.assert_allclose(stats.sample, x[::5], rtol=1e-4, atol=1e-5)


def test_experts_of_any_number_of_rows():
    """None, one, a whole tile, more than one."""
    rng = np.random.default_rng(0)
    counts = np.asarray([0, 1, TILE, 3, 2 * TILE + 5, 0])
    x = rng.standard_normal((counts.sum(), 8)).astype(np.float32).astype(np.float64)
    stats = reduce_expert_inputs(jnp.asarray(x, jnp.float32), jnp.asarray(counts), ALL | {"peak"}, rows=4)
    np.testing.assert_array_equal(stats.tokens, counts)
    for e, rows in enumerate(np.split(x, np.cumsum(counts)[:-1])):
        # A sum of n products in float32 is off by at most n 2^-24 of the sum of their sizes.
        bound = 2.0**-24 * (len(rows) + 1) * (np.abs(rows).T @ np.abs(rows)) + 1e-30
        assert (np.abs(stats.hessian[e] - rows.T @ rows) <= bound).all()
        taken = rows[:: max(-(-len(rows) // 4), 1)]
        np.testing.assert_allclose(stats.sample[e, : len(taken)], taken, rtol=1e-6)
        assert not np.any(stats.sample[e, len(taken) :])
        np.testing.assert_array_equal(stats.peak[e], np.abs(rows).max(0, initial=0.0))


def test_batches_add_up():
    x = np.random.default_rng(3).standard_normal((300, 16)).astype(np.float32)
    whole = reduce_inputs(jnp.asarray(x), ALL)
    parts = sum((reduce_inputs(jnp.asarray(p), ALL) for p in np.split(x, [100, 130])[1:]), reduce_inputs(x[:100], ALL))
    assert isinstance(parts, InputStats)
    # Sums of up to 300 products, in other orders: both within 300 x 2^-24 of the sum of the sizes.
    bound = 2 * 300 * 2.0**-24 * (np.abs(x).T.astype(np.float64) @ np.abs(x))
    assert (np.abs(np.asarray(parts.hessian) - whole.hessian) <= bound).all()
    assert parts.sample.shape == (300, 16)


def test_what_lies_behind_the_last_input_is_not_computed():
    params = random_params(CONFIG, dtype=jnp.float32)["block_0"]
    h, tokens = jnp.zeros((1, 32, 64)), jnp.zeros((1, 32), jnp.int32)
    needs = frozenset({"total"})
    flops = [
        input_statistics.lower(CONFIG, KIND, params, h, tokens, None, (i,), needs).compile().cost_analysis()["flops"]
        for i in (0, 3)
    ]
    matrices = 32 * 2 * 64 * (64 + 32 + 32)  # q, k and v alone
    assert flops[0] < matrices < flops[1]
