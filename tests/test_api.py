"""The library's front: what it refuses before it computes."""

import pytest
from small_models import llama_config, random_params

import lq
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.models.decoder import Decoder
from lq.numerics.spec import QuantSpec

CONFIG, OTHER = llama_config(2), llama_config(2, hidden=128)
SPEC = QuantSpec(bits=3, group_size=32)


def test_a_plan_for_other_shapes_is_refused_and_nothing_is_written(tmp_path):
    plan = lq.uniform_plan(OTHER, SPEC)
    with pytest.raises(UserError, match="plan: made for another model"):
        lq.quantize(Decoder(CONFIG), random_params(CONFIG), plan)
    with pytest.raises(UserError, match="plan: made for another model"):
        lq.save(tmp_path / "q", Decoder(CONFIG), random_params(CONFIG), plan, original="standin")
    assert not (tmp_path / "q").exists()


def test_packed_parameters_have_no_zd_but_a_lim():
    model, params = Decoder(CONFIG), random_params(CONFIG)
    packed = lq.quantize(model, params, lq.uniform_plan(CONFIG, SPEC))
    with pytest.raises(UserError, match="metric zd: block_0 is packed; score the original model"):
        lq.score(model, packed, metric="zd")
    windows = lq.calibration_windows(lq.load("standin")[2], "standin", samples=2, length=16)
    lim = lq.score(model, packed, windows, metric="lim")
    assert isinstance(lim, Scores)
    assert set(lim.values) == {"block_0", "block_1"}


def test_packed_parameters_are_not_quantized_again():
    model, plan = Decoder(CONFIG), lq.uniform_plan(CONFIG, SPEC)
    packed = lq.quantize(model, random_params(CONFIG), plan)
    with pytest.raises(UserError, match=r"^params: packed already; give the original model's$"):
        lq.quantize(model, packed, plan)


def test_a_transform_of_the_model_is_no_scaling():
    """Its parameters would belong to another model than the one they are returned for."""
    with pytest.raises(UserError, match=r"^scaling: 'hadamard' is not one of awq, smoothquant; .*lq\.transform$"):
        lq.quantize(Decoder(CONFIG), random_params(CONFIG), lq.uniform_plan(CONFIG, SPEC), scaling="hadamard")


def test_weights_that_are_not_finite_are_refused_by_name():
    params = random_params(CONFIG)
    kernel = params["block_1"]["mlp"]["up_proj"]["kernel"]
    params["block_1"]["mlp"]["up_proj"]["kernel"] = kernel.at[3, 4].set(float("nan"))
    with pytest.raises(UserError, match="block_1/mlp/up_proj"):
        lq.quantize(Decoder(CONFIG), params, lq.uniform_plan(CONFIG, SPEC))
    with pytest.raises(UserError, match="block_1"):
        lq.score(Decoder(CONFIG), params, metric="zd")


def test_a_checkpoint_described_by_another_model_is_refused_and_nothing_is_written(tmp_path):
    model, plan = Decoder(CONFIG), lq.uniform_plan(CONFIG, SPEC)
    packed = lq.quantize(model, random_params(CONFIG), plan)
    with pytest.raises(UserError, match="config"):
        lq.save(tmp_path / "q", model, packed, plan, original="standin")
    assert not (tmp_path / "q").exists()


def test_the_names_that_messages_tell_to_write_are_there():
    assert lq.Pin(pattern="v_proj", bits=4).bits == 4
    assert lq.QuantSpec(bits=3).bits == 3
