"""Scores: closed forms, the planted block, direction, determinism, and the mistakes found in public code."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_models import llama_config, random_params

from lq.allocation import allocate
from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance import METRICS, Scores, reverse, score
from lq.importance.controls import use_more_bits
from lq.importance.lim import cosines
from lq.importance.units import units_of
from lq.importance.zd import ZDOptions, fraction_beyond
from lq.models.context import context_for
from lq.models.decoder import apply_block, embed
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.sealed import unsealed

pytestmark = pytest.mark.once

BLOCKS = 4
# Options of scores that take many passes with their defaults.
ROUNDED = {"bits": [2, 4], "group_size": 32, "options": {"clip": "none"}}
QUICK = {
    "delta_loss": ROUNDED,
    "first_order": ROUNDED,
    "fisher": ROUNDED,
    "hessian_trace": {**ROUNDED, "probes": 2},
    "kl": ROUNDED,
    "linearity": ROUNDED,
    "output_mse": ROUNDED,
    "path_integral": {**ROUNDED, "steps": 1},
    "predicted_kl": {**ROUNDED, "draws": 1},
    "shapley": {**ROUNDED, "orders": 2},
}


def windows(count=6, length=32, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 4096, (count, length)).astype(np.int32)
    return Windows(tokens, "random", "random")


@pytest.fixture(scope="module")
def source():
    config = llama_config(BLOCKS)
    return InMemory(config, random_params(config, dtype=jnp.float32))


def numpy_lim(source, tokens, aggregation, first=0):
    """-cos in float64 on hidden states taken one block after the other, never after the final norm."""
    context = context_for(jnp.asarray(tokens))
    h = embed(source.config, source.params(), tokens, context)
    scores = []
    for index, kind in enumerate(source.config.kinds):
        out = apply_block(source.config, kind, source.block(index), h, context)
        a, b = (np.asarray(v, np.float64)[:, first:] for v in (h, out))
        if aggregation == "flat":
            a, b = a.reshape(len(a), 1, -1), b.reshape(len(b), 1, -1)
        cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        scores.append(-cosine.mean())
        h = out
    return scores


@pytest.mark.parametrize("aggregation", ["token", "flat"])
@pytest.mark.parametrize("skip", [False, True])
def test_lim_equals_float64(source, aggregation, skip):
    options = {"aggregation": aggregation, "skip_position_0": skip, "batch_size": 4}
    got = score(source, "lim", windows(), options)
    other = "with_position_0" if skip else "without_position_0"
    # Sums of 64 products in float32: relative error below 64 * 2^-24, and as much again for the mean.
    np.testing.assert_allclose(
        list(got.values.values()), numpy_lim(source, windows().tokens, aggregation, int(skip)), atol=1e-5
    )
    np.testing.assert_allclose(
        list(got.extra[other].values()), numpy_lim(source, windows().tokens, aggregation, int(not skip)), atol=1e-5
    )


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_lim_of_known_blocks(factor):
    h = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    orthogonal = np.concatenate([-h[..., 4:], h[..., :4]], -1)
    for out, cosine in ((h, 1.0), (-h, -1.0), (orthogonal, 0.0)):
        for name, value in cosines(jnp.asarray(h), jnp.asarray(factor * out)).items():
            np.testing.assert_allclose(np.asarray(value), cosine, atol=1e-6, err_msg=name)


def test_a_dead_token_counts_as_orthogonal_and_not_as_nan():
    h = jnp.zeros((1, 3, 8)).at[0, 1].set(1.0)
    assert np.isfinite(np.asarray(cosines(h, h)["token"])).all()


@pytest.mark.parametrize(
    ("distribution", "one", "two"),
    [
        (stats.norm(), 0.15866, 0.31731),
        (stats.laplace(), 0.12156, 0.24312),
        (stats.uniform(-1, 2), 0.21132, 0.42265),
    ],
)
def test_zd_of_known_distributions(distribution, one, two):
    weights = distribution.rvs((400, 1000), random_state=0).astype(np.float32)
    pool = [jnp.asarray(weights[:100]), jnp.asarray(weights[100:])]
    for sides, expected in (("one", one), ("two", two)):
        got = fraction_beyond(pool, ZDOptions(sides=sides))
        # A binomial share of 400,000: four standard errors, and as much for the estimated deviation.
        assert got == pytest.approx(expected, abs=8 * np.sqrt(expected / 400_000))


def test_zd_ignores_shift_and_scale():
    weights = np.random.default_rng(0).standard_t(4, (64, 64)).astype(np.float32)
    shifted = 3.0 * weights + 0.5
    assert fraction_beyond([jnp.asarray(weights)], ZDOptions()) == fraction_beyond([jnp.asarray(shifted)], ZDOptions())


def test_zd_pools_the_block_or_averages_its_matrices(source):
    def z_share(w):
        w = np.concatenate([v.ravel() for v in w]).astype(np.float64)
        return ((w - w.mean()) / w.std() > 1).mean()

    block = source.block(0)
    weights = [np.asarray(block["attention"][f"{n}_proj"]["kernel"]) for n in "qkvo"]
    weights += [np.asarray(block["mlp"][f"{n}_proj"]["kernel"]) for n in ("gate", "up", "down")]
    pooled = score(source, "zd").values["block_0"]
    averaged = score(source, "zd", options={"pooling": "matrix"}).values["block_0"]
    assert -pooled == pytest.approx(z_share(weights), abs=2 / sum(w.size for w in weights))
    assert -averaged == pytest.approx(np.mean([z_share([w]) for w in weights]), abs=1e-4)


@pytest.mark.parametrize("planted", range(BLOCKS))
def test_lim_ranks_a_planted_block_first(source, planted):
    """A block whose branches write twenty times more changes its input most, wherever it stands: also at either end."""
    params = {name: dict(part) for name, part in source.params().items()}
    for index in range(BLOCKS):
        block = params[f"block_{index}"]
        factor = 20.0 if index == planted else 0.05
        block["attention"] = block["attention"] | {
            "o_proj": {"kernel": factor * block["attention"]["o_proj"]["kernel"]}
        }
        block["mlp"] = block["mlp"] | {"down_proj": {"kernel": factor * block["mlp"]["down_proj"]["kernel"]}}
    scores = score(InMemory(source.config, params), "lim", windows())
    assert scores.ranking()[0] == f"block_{planted}"


@pytest.mark.parametrize("planted", range(BLOCKS))
def test_zd_ranks_a_heavy_tailed_block_first(source, planted):
    """Fewer weights far above average is more important: published ports sort this the wrong way round."""
    params = {name: dict(part) for name, part in source.params().items()}
    block = params[f"block_{planted}"]
    kernel = np.asarray(block["mlp"]["up_proj"]["kernel"]).copy()
    kernel[:2] *= 50
    block["mlp"] = block["mlp"] | {"up_proj": {"kernel": jnp.asarray(kernel)}}
    scores = score(InMemory(source.config, params), "zd")
    assert scores.ranking()[0] == f"block_{planted}"


@pytest.mark.parametrize("metric", METRICS)
def test_contract(source, metric):
    """Every metric: one finite number per unit in order, the same twice, unknown options refused."""
    first, second = (score(source, metric, windows(), QUICK.get(metric)) for _ in range(2))
    assert first == second
    unit = getattr(METRICS.options(metric, {}), "unit", "block")
    assert list(first.values) == list(units_of(source.config, unit))
    assert all(isinstance(value, float) for value in first.values.values())
    assert (first.calibration is not None) == ("calibration" in METRICS[metric].needs)
    with pytest.raises(UserError, match=f"metric {metric}: unknown option 'nonsense'"):
        score(source, metric, windows(), {"nonsense": 1})


def test_scores_do_not_depend_on_the_order_of_calibration_windows(source):
    shuffled = dataclasses.replace(windows(), tokens=windows().tokens[::-1].copy())
    a, b = (score(source, "lim", w, {"batch_size": 4}).values for w in (windows(), shuffled))
    np.testing.assert_allclose(list(a.values()), list(b.values()), atol=1e-6)


def test_controls(source):
    ends = score(source, "first_last").ranking()
    assert ends == ["block_0", "block_3", "block_1", "block_2"]
    orders = {tuple(score(source, "random", options={"seed": s}).ranking()) for s in range(8)}
    assert len(orders) > 4
    lim = score(source, "lim", windows())
    assert reverse(lim).ranking() == lim.ranking()[::-1]
    assert reverse(lim).metric == "reverse lim"
    tied = score(source, "parameter_count")
    assert tied.ranking() == [f"block_{i}" for i in range(BLOCKS)]
    assert reverse(tied).ranking() == tied.ranking()[::-1]


def test_where_every_weight_counts_alike_widths_are_nearly_equal(source):
    weights = score(source, "parameter_count", options={"unit": "matrix"})
    shapes = matrices(source.config)
    assert weights.values == {path: float(np.prod(shape)) for path, shape in shapes.items()}
    given = {"bits": (1, 2, 3, 4, 5), "spec": QuantSpec(bits=4, group_size=32), "costs": "value", "method": "knapsack"}
    for bpw, widths in ((3.9, {3, 4}), (2.75, {2, 3})):
        plan = allocate(weights, bpw=bpw, **given)
        assert {spec.bits for spec in plan.specs.values()} == widths
        assert bpw - 0.1 < plan.bpw <= bpw


def test_use_more_bits_is_the_rule_of_llama_cpp():
    raised = {block for block in range(32) if use_more_bits(block, 32)}
    assert raised == {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {block for block in range(4) if use_more_bits(block, 4)} == {2, 3}


def test_recipes_of_practice(source):
    tiers = score(source, "k_quant").values
    for path, tier in tiers.items():
        kind, more = path.rpartition("/")[2], path.startswith(("block_2/", "block_3/"))
        assert tier == (2 if kind in ("v_proj", "down_proj") and more else kind in ("v_proj", "down_proj", "o_proj"))
    for seed in range(4):
        order = score(source, "ends_random", options={"seed": seed}).ranking()
        assert order[:3] == ["block_0", "block_1", "block_3"]
    longer = InMemory(llama_config(9), random_params(llama_config(9)))
    orders = {tuple(score(longer, "ends_random", options={"seed": seed}).ranking()) for seed in range(8)}
    assert len(orders) == 8
    assert {order[:3] for order in orders} == {("block_0", "block_1", "block_8")}


def test_scores_survive_json(source, tmp_path):
    scores = score(source, "lim", windows())
    scores.write(tmp_path / "lim.json")
    assert Scores.read(tmp_path / "lim.json") == scores


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"metric": 1}', "\x00", "[" * 100_000], ids=range(6))
def test_other_files_are_no_scores(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="not a scores file"):
        Scores.read(tmp_path / "x.json")


@pytest.mark.parametrize("shape", [[], [64], [64, 2.5], [64, "64"], [64, 0], [64, True], [2**40, 2**40], 64, None])
def test_a_damaged_shape_is_one_line(source, tmp_path, shape):
    file = tmp_path / "zd.json"
    score(source, "first_last").write(file)
    data = unsealed(json.loads(file.read_text()))
    data["shapes"]["block_1/mlp/up_proj"] = shape
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"^[^\n]*zd\.json: [^\n]*shapes[.:] ?block_1/mlp/up_proj[.:][^\n]*$"):
        Scores.read(file)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ({"other_weights": "many"}, "not a scores file (other_weights: Input should be a valid integer)"),
        ({"other_weights": True}, "not a scores file (other_weights: "),
        ({"other_weights": -5}, "score first_last: other_weights: -5; score again"),
        ({"costs": []}, "not a scores file (costs: "),
        ({"costs": None}, "not a scores file (costs: "),
        ({"costs": {"block_0": {}}}, "score first_last: costs that are not those of the units"),
        ({"values": {"block_0": True}}, "not a scores file (values.block_0: "),
        ({"values": {"block_0": math.nan}}, "score first_last: block_0 is nan"),
        ({"metric": None}, "not a scores file (metric: "),
        ({"model": [1]}, "not a scores file (model: "),
        ({"options": None}, "not a scores file (options: "),
        ({"passes": "x"}, "not a scores file (passes: "),
        ({"more": 1}, "not a scores file (more: no key of it)"),
    ],
)
def test_damaged_scores_are_one_line(source, tmp_path, damage, line):
    file = tmp_path / "zd.json"
    score(source, "first_last").write(file)
    file.write_text(json.dumps(unsealed(json.loads(file.read_text())) | damage))
    with pytest.raises(UserError) as refused:
        Scores.read(file)
    assert str(refused.value).startswith(f"{file}: {line}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("random", {"seed": -1}, "seed: -1; write 0 or more"),
        ("zd", {"threshold": float("nan")}, "threshold: nan standard deviations; write a finite number"),
        ("zd", {"threshold": float("-inf")}, "threshold: -inf standard deviations; write a finite number"),
    ],
)
def test_options_that_mean_nothing_are_refused(metric, options, message):
    with pytest.raises(UserError, match=message):
        METRICS.options(metric, options)


def test_missing_calibration_and_unknown_metric_are_one_line(source):
    with pytest.raises(UserError, match="metric lim needs calibration text; give --calibration FILE"):
        score(source, "lim")
    with pytest.raises(UserError, match=r"unknown metric 'limm'; known: lim, zd, .*; did you mean lim\?"):
        score(source, "limm")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("pooling", ["block", "matrix"])
def test_zd_refuses_a_weight_that_is_not_finite_and_names_its_matrix(source, value, pooling):
    params = {name: dict(part) for name, part in source.params().items()}
    block = params["block_2"]
    kernel = block["mlp"]["down_proj"]["kernel"].at[3, 5].set(value)
    block["mlp"] = block["mlp"] | {"down_proj": {"kernel": kernel}}
    with pytest.raises(UserError, match=r"^metric zd: block_2/mlp/down_proj: [^\n]* no finite deviation; [^\n]*$"):
        score(InMemory(source.config, params), "zd", options={"pooling": pooling})


def test_a_score_that_is_not_finite_is_refused(source):
    with pytest.raises(UserError, match="block_1 is nan"):
        dataclasses.replace(score(source, "zd"), values={"block_0": 1.0, "block_1": float("nan")})
