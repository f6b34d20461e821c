"""Predicted KL: the second order itself, segments that make up their matrices, and plans made of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from perturbed_models import NAMES, OPTIONS, SCORED, WINDOWS, errors, small_source
from small_models import llama_config, random_params
from whole_model import in_float64, kernels_of, with_kernels

from lq.allocation import allocate
from lq.calibration.data import Windows
from lq.calibration.statistics import InputStats
from lq.checkpoint import open_quantized, write_quantized
from lq.errors import UserError
from lq.evaluation import evaluate, make_reference
from lq.importance import METRICS, score
from lq.importance.backward import WindowGradients
from lq.importance.predicted import PredictedOptions, SegmentErrors, segment_slopes
from lq.models.decoder import Decoder
from lq.models.loading import open_checkpoint
from lq.models.source import InMemory
from lq.numerics.segmented import SegmentedQTensor
from lq.numerics.spec import QuantSpec
from lq.pipeline import Pipeline
from lq.quantizers.gptq import GPTQOptions, factorize
from lq.quantizers.runs import gptq_widths, rtn_widths

pytestmark = pytest.mark.once


def second_order(source, error) -> float:
    """1/2 sum over positions of sum_v p_v (d ln p_v)^2, the derivative along an error, per scored token; float64."""
    with jax.enable_x64(True):
        params, moved = in_float64(source.params()), {path: jnp.asarray(e) for path, e in error.items()}
        kernels = {path: jnp.asarray(w) for path, w in kernels_of(source.config, params).items()}

        def log_p(chosen):
            logits = Decoder(source.config).apply({"params": with_kernels(params, kernels | chosen)}, WINDOWS.tokens)
            return jax.nn.log_softmax(logits[:, :-1])

        at = {path: kernels[path] for path in error}
        p, slope = jax.jvp(log_p, (at,), (moved,))
        return float(0.5 * jnp.sum(jnp.exp(p) * slope**2) / SCORED)


def test_a_price_is_the_second_order_of_the_divergence():
    """On average over labels; a price is the mean of 256 squares of sums, and off by a share of sqrt(2 / 256)."""
    source = small_source(1)
    found = score(source, "predicted_kl", WINDOWS, OPTIONS | {"draws": 64, "unit": "matrix"})
    for bits, name in zip((2, 4), NAMES, strict=True):
        error = errors(source, bits)
        for path, of_unit in found.costs.items():
            expected = second_order(source, {path: error[path]})
            assert of_unit[name] == pytest.approx(expected, rel=5 * np.sqrt(2 / 256)), "one in a million is beyond"
    assert found.passes == 1 + 1 + 2 * 64


def test_units_are_priced_as_a_whole():
    """Interactions of the matrices of a unit are in its price: it is not the sum of theirs."""
    source = small_source(1)
    found = score(source, "predicted_kl", WINDOWS, OPTIONS | {"draws": 64, "unit": "block"})
    expected = second_order(source, errors(source, 2))
    assert found.costs["block_0"][NAMES[0]] == pytest.approx(expected, rel=5 * np.sqrt(2 / 256))


def layer(K=128, N=48):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)) / np.sqrt(K))
    x *= np.exp(rng.standard_normal(K))
    hessian = x.T @ x
    return rng.standard_normal((K, N)), hessian, rng.standard_normal((K, N))


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_a_segment_causes(method, gain):
    """In float64: rows of W - Q where each weight is rounded for itself; of GPTQ what follows from each channel too,
    and where its outputs have unit gain, as if it were rounded alone."""
    weight, hessian, gradient = layer()
    K = len(weight)
    stats = InputStats(tokens=500.0, hessian=jnp.asarray(hessian, jnp.float32), square=jnp.asarray(np.diag(hessian)))
    quantizer = {"unit_gain": gain}
    options = PredictedOptions(method=method, options=quantizer, bits=[2, 3], group_size=32, segment_channels=32)
    prepared = factorize(stats, GPTQOptions()) if method == "gptq" else stats
    attributed = SegmentErrors.of_matrix(options, jnp.asarray(weight, jnp.float32), stats, prepared)
    given = WindowGradients({}, {"up_proj": jnp.asarray(gradient, jnp.float32)}, {}, {})
    found = np.asarray(segment_slopes(given, {"up_proj": attributed})["up_proj"])
    assert found.shape == (2, 4)

    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(K)
    R = np.linalg.cholesky(damped[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    inner = lambda a, b: (a * (damped @ b)).sum(0)  # noqa: E731
    of_outputs = gain and method == "gptq"
    plain = dataclasses.replace(options.recipe.options, unit_gain=gain and not of_outputs)
    for i, bits in enumerate((2, 3)):
        spec = QuantSpec(bits=bits, group_size=32, widths=(bits,) * 4)
        segments = (gptq_widths if method == "gptq" else rtn_widths)(
            jnp.asarray(weight, jnp.float32), prepared, spec, plain
        )
        tensor = SegmentedQTensor.from_segments(*segments, spec, weight.shape)
        difference = weight - np.asarray(tensor.dequantize(), np.float64)
        runs = np.asarray(tensor.channels)  # of a group each
        for s in range(4):
            if method == "rtn":
                caused = np.where((runs == s)[:, None], difference, 0.0)
            else:
                C = R.T @ difference[order]
                caused = np.zeros_like(difference)
                caused[order] = np.linalg.inv(R).T @ np.where((runs[order] == s)[:, None], C, 0.0)
            caused = -caused  # of Q - W
            if of_outputs:  # what the segment changes alone, its outputs given their size back
                caused = (weight + caused) * inner(weight, weight) / inner(weight, weight + caused) - weight
            scale = np.abs(gradient * caused).sum()
            assert found[i, s] == pytest.approx((gradient * caused).sum(), abs=1e-4 * scale)
        if not of_outputs:
            assert found[i].sum() == pytest.approx(-(gradient * difference).sum(), rel=1e-3)


@pytest.fixture(scope="module")
def segments():
    config = llama_config(2)
    source = InMemory(config, random_params(config))
    given = {"bits": [2, 4], "group_size": 32, "batch_size": 2, "unit": "segment", "segment_channels": 32}
    return source, score(source, "predicted_kl", WINDOWS, given | {"draws": 4})


def test_segments_are_units(segments):
    _, found = segments
    per_block = {"attention/q_proj": 2, "attention/k_proj": 2, "attention/v_proj": 2, "attention/o_proj": 2}
    per_block |= {"mlp/gate_proj": 2, "mlp/up_proj": 2, "mlp/down_proj": 4}
    names = {f"block_{i}/{path}:{s}/{n}" for i in range(2) for path, n in per_block.items() for s in range(n)}
    assert set(found.costs) == names
    assert all(of_unit["int2-g32"] > of_unit["int4-g32"] > 0 for of_unit in found.costs.values())


@pytest.mark.long
def test_a_plan_of_segments_is_written_and_read(segments, small_model, tmp_path):
    source = open_checkpoint(small_model.path)
    given = {"bits": [2, 4], "group_size": 32, "unit": "segment", "segment_channels": 32, "draws": 2}
    text = Windows(np.random.default_rng(0).integers(0, 4096, (4, 32), np.int32), "random", "random")
    found = score(source, "predicted_kl", text, given)
    plan = allocate(found, bpw=3.9, bits=(2, 4), spec=QuantSpec(bits=4, group_size=32), method="knapsack")
    assert any(spec.widths is not None for spec in plan.specs.values())
    rounding = Pipeline.read("rtn", {"importance": True, "clip": "opt"})
    packed, plan = rounding.quantized(source, plan, text, batch_size=2)
    write_quantized(packed, plan, tmp_path / "q", quantizer={"method": "rtn"}, description=source.path)
    again = open_quantized(tmp_path / "q")
    assert again.plan.bpw == plan.bpw <= 3.9
    reference = make_reference(source, text, batch_size=2)
    lost = evaluate(again, text, reference=reference, batch_size=2).kl
    uniform = allocate(found, bpw=None, bits=(2,), spec=QuantSpec(bits=2, group_size=32), method="knapsack")
    worse, uniform = rounding.quantized(source, uniform, text, batch_size=2)
    assert uniform.bpw < plan.bpw
    assert 0 < lost < evaluate(worse, text, reference=reference, batch_size=2).kl


def test_the_order_of_the_windows_does_not_matter(segments):
    source, found = segments
    shuffled = Windows(WINDOWS.tokens[[2, 0, 3, 1]], "random", "random")
    given = {"bits": [2, 4], "group_size": 32, "batch_size": 2, "unit": "segment", "segment_channels": 32}
    again = score(source, "predicted_kl", shuffled, given | {"draws": 4})
    for unit, of_unit in found.costs.items():
        # Second moments are summed in another order, and a weight on a tie may round otherwise.
        assert again.costs[unit] == pytest.approx(of_unit, rel=2e-2)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"draws": 0}, "draws: 0; write 1 or more"),
        ({"seed": -1}, "seed: -1; write a whole number"),
        (
            {"unit": "segment", "method": "hqq", "zero_dtype": "bfloat16"},
            "unit: segment, but no segments of hqq are priced",
        ),
        ({"unit": "segment", "method": "rsq"}, "unit: segment, but no segments of rsq are priced"),
        (
            {"unit": "segment", "method": "gptq", "options": {"static_groups": True}},
            "unit: segment, but with ranges of the original weights",
        ),
        ({"unit": "segment", "by_energy": True}, "unit: segment, whose groups are by energy in any case"),
        ({"unit": "segment", "group_size": [32, 64]}, "group_size: the segments of a matrix share one"),
        (
            {"unit": "segment", "segment_channels": 96},
            "segment_channels: 96, in groups of 128; write 128 or a multiple of it",
        ),
    ],
)
def test_options_that_cannot_be(given, line):
    with pytest.raises(UserError, match=line):
        METRICS.options("predicted_kl", given)


def test_a_matrix_that_segments_do_not_divide_is_one_unit():
    options = METRICS.options("predicted_kl", {"unit": "segment", "group_size": 32, "segment_channels": 96})
    assert [options.segments((channels, 64)) for channels in (64, 96, 192, 256)] == [1, 1, 2, 1]
