"""The library's front: what it refuses before it computes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_models import config_of
from small_models import llama_config, random_params

import lq
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.models.decoder import Decoder
from lq.numerics.spec import QuantSpec
from lq.quantizers import QuantizedStream

CONFIG, OTHER = llama_config(2), llama_config(2, hidden=128)
SPEC = QuantSpec(bits=3, group_size=32)


def test_a_plan_for_other_shapes_is_refused_and_nothing_is_written(tmp_path):
    plan = lq.uniform_plan(OTHER, SPEC)
    with pytest.raises(UserError, match="plan: made for another model"):
        lq.quantize(Decoder(CONFIG), random_params(CONFIG), plan)
    with pytest.raises(UserError, match="plan: made for another model"):
        lq.save(tmp_path / "q", Decoder(CONFIG), random_params(CONFIG), plan, original="standin", method="rtn")
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


NOT_TOKENS = {"none": np.zeros((0, 8), np.int32), "flat": np.zeros(8, int), "real": np.zeros((2, 8)), "list": [[1, 2]]}


@pytest.mark.parametrize("tokens", NOT_TOKENS.values(), ids=NOT_TOKENS)
def test_windows_without_tokens_are_refused(tokens):
    line = r"^windows: tokens \[.*\] of .*; give whole numbers \[windows, length\], at least one$"
    with pytest.raises(UserError, match=line):
        lq.Windows(tokens, "mine", "by hand")


def test_tokens_alone_are_no_windows():
    model, params, plan = Decoder(CONFIG), random_params(CONFIG), lq.uniform_plan(CONFIG, SPEC)
    tokens = np.zeros((2, 8), np.int32)
    line = r"^calibration: ndarray is not what lq\.calibration_windows returns; of tokens of your own make lq\.Windows"
    with pytest.raises(UserError, match=line):
        lq.quantize(model, params, plan, method="gptq", calibration=tokens)
    with pytest.raises(UserError, match=line):
        lq.score(model, params, tokens, metric="lim")
    with pytest.raises(UserError, match=r"^evaluation: ndarray is not what lq\.evaluation_windows returns"):
        lq.evaluate(model, params, tokens)


@pytest.fixture(scope="module")
def windows():
    return lq.Windows(np.random.default_rng(0).integers(0, 90, (2, 16), np.int32), "random", "random")


def test_progress_and_notes_are_shown_unless_quiet(windows, capsys):
    config = config_of("mixtral")
    model, params, plan = Decoder(config), random_params(config), lq.uniform_plan(config, SPEC)
    lq.quantize(model, params, plan, method="gptq", calibration=windows, quiet=True)
    assert capsys.readouterr() == ("", "")
    lq.quantize(model, params, plan, method="gptq", calibration=windows)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("gptq: every block is calibrated on what the quantized blocks before it let through")
    assert any(re.search(r"experts saw fewer than \d+ tokens", line) for line in lines)
    assert re.fullmatch(r"quantize \(gptq\) 2/4, \d+:\d\d left, .* GiB: block_0, .*% output error", shown(lines)[1])
    assert len(shown(lines)) == config.num_blocks + 2


def shown(lines):
    return [line for line in lines if line.startswith("quantize")]


def test_biases_are_corrected_of_a_model_that_has_some(windows):
    model, params = Decoder(CONFIG), random_params(CONFIG)
    plan = lq.uniform_plan(CONFIG, SPEC)
    correct = {"calibration": windows, "bias_correction": True, "quiet": True}
    with pytest.raises(UserError, match=r"^bias_correction: .* add them with the transform add_biases"):
        lq.quantize(model, params, plan, **correct)
    model, params = lq.transform(model, params, "add_biases")
    plan = lq.uniform_plan(model.config, SPEC)
    packed = lq.quantize(model, params, plan, **correct)
    assert np.abs(packed["block_0"]["mlp"]["up_proj"]["bias"]).max() > 0


def test_a_checkpoint_says_how_it_was_made(windows, small_model, tmp_path):
    """The same as one that the command writes."""
    model, plan = Decoder(small_model.config), lq.uniform_plan(small_model.config, SPEC)
    how = {"method": "gptq", "options": {"damping": 0.02}, "calibration": windows, "scaling": {"name": "awq"}}
    packed = lq.quantize(model, small_model.params, plan, quiet=True, **how)
    lq.save(tmp_path / "q", model, packed, plan, original=small_model.path, **how)
    record = json.loads((tmp_path / "q" / "lq.json").read_text())["quantizer"]
    assert record["method"] == "gptq"
    assert record["options"]["damping"] == 0.02
    assert record["scaling"] == "awq"
    assert record["calibration"] == {"tokens": windows.fingerprint, "how": "random", "batch_size": 8}


def test_a_checkpoint_is_quantized_from_disk_to_disk_and_gone_on_with(windows, small_model, tmp_path, monkeypatch):
    """To the byte what memory gives, also after an interruption in the middle."""
    plan = lq.uniform_plan(small_model.config, SPEC)
    given = {"method": "gptq", "calibration": windows, "quiet": True}
    model, params, _ = lq.load(small_model.path)
    packed = lq.quantize(model, params, plan, **given)
    recorded = {"method": "gptq", "calibration": windows, "original": small_model.path}
    lq.save(tmp_path / "memory", model, packed, plan, **recorded)

    def interrupted(self, *args, **options):
        if self.chains().position == 1:
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    whole = QuantizedStream._next_block
    monkeypatch.setattr(QuantizedStream, "_next_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lq.quantize_checkpoint(small_model.path, plan, tmp_path / "disk", **given)
    monkeypatch.undo()
    with pytest.raises(UserError, match="resume"):
        lq.quantize_checkpoint(small_model.path, plan, tmp_path / "disk", **given)
    assert lq.quantize_checkpoint(small_model.path, plan, tmp_path / "disk", **given, resume=True) == plan
    memory, disk = (  # lq.json of the second has the measured errors as well
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "lq.json"}
        for name in ("memory", "disk")
    )
    assert disk == memory
    for wrong, line in [({"transforms": "hadamard"}, "is no list"), ({"batch_size": "8"}, "whole number from 1")]:
        with pytest.raises(UserError, match=line):
            lq.quantize_checkpoint(small_model.path, plan, tmp_path / "other", **given, **wrong)
    with pytest.raises(UserError, match=r"is no Plan; make one with lq\.allocate"):
        lq.quantize_checkpoint(small_model.path, "plan.json", tmp_path / "other", **given)
    other = lq.uniform_plan(OTHER, SPEC)
    with pytest.raises(UserError, match="plan: made for another model"):
        lq.quantize_checkpoint(small_model.path, other, tmp_path / "other", **given)
    assert not (tmp_path / "other").exists()


def test_output_channels_are_shared_out_over_the_devices_there_are():
    """By every function of the library, nobody having asked; and what comes back is on one device."""
    script = Path(__file__).parent / "several_devices.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"


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
        lq.save(tmp_path / "q", model, packed, plan, original="standin", method="rtn")
    assert not (tmp_path / "q").exists()


def test_the_names_that_messages_tell_to_write_are_there():
    assert lq.Pin(pattern="v_proj", bits=4).bits == 4
    assert lq.QuantSpec(bits=3).bits == 3
