"""A calibrated quantization that is killed goes on from the states it kept, and ends in the same bytes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lq.allocation import uniform_plan
from lq.calibration.data import Windows
from lq.checkpoint import open_quantized, states, write_quantized
from lq.checkpoint import write as writing
from lq.errors import UserError
from lq.models.loading import open_checkpoint
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.pipeline import Pipeline

pytestmark = pytest.mark.once

WINDOWS = Windows(np.random.default_rng(0).integers(0, 4096, (4, 32), np.int32), "random", "random tokens")
WRITERS = ("write_file", "write_tensors", "write_text")
FEW = {"steps": 3, "batch_size": 2}


def write(path, out, method, params=None, **kwargs):
    source = open_checkpoint(path)
    pipeline = Pipeline.read(method, {} if method == "gptq" else FEW)
    plan = uniform_plan(source.config, QuantSpec(bits=3, group_size=32))
    original = source if params is None else InMemory(source.config, params)
    packed, plan = pipeline.quantized(original, plan, WINDOWS, batch_size=2)
    record = pipeline.to_dict() | {"calibration": WINDOWS.fingerprint}
    write_quantized(packed, plan, out, quantizer=record, description=source.path, **kwargs)


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.long
@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_killed_at_any_file(small_model, tmp_path, monkeypatch, method):
    """At each file that a write makes in turn: shards, states, the record of both, the manifest."""
    write(small_model.path, tmp_path / "whole", method)
    whole, made = contents(tmp_path / "whole"), []
    checkpoint = open_quantized(tmp_path / "whole")
    measured = checkpoint.measured
    name = "output error" if method == "gptq" else "of rounding's error"
    assert measured.keys() == checkpoint.plan.specs.keys()
    assert all(0 < errors[name] <= 1 for errors in measured.values())
    assert not any(name.startswith(("states", "shards")) for name in whole)
    for name in WRITERS:
        monkeypatch.setattr(writing, name, _counted(getattr(writing, name), made, None))
    monkeypatch.setattr(states, "write_tensors", _counted(states.write_tensors, made, None))
    write(small_model.path, tmp_path / "counted", method)
    moments = range(2, len(made), 3)  # the embedding's record, a shard, states, a record, ... the manifest
    monkeypatch.undo()
    for moment in moments:
        out, seen = tmp_path / f"killed-{moment}", []
        with monkeypatch.context() as patch:
            for module, name in [*((writing, name) for name in WRITERS), (states, "write_tensors")]:
                patch.setattr(module, name, _counted(getattr(module, name), seen, moment))
            with pytest.raises(KeyboardInterrupt):
                write(small_model.path, out, method)
        write(small_model.path, out, method, resume=True)
        assert contents(out) == whole, f"killed as it wrote {made[moment]}"


def _counted(function, made: list, kill_at: int | None):
    def write(path, *args):
        if len(made) == kill_at:
            raise KeyboardInterrupt
        made.append(path)
        return function(path, *args)

    return write


def test_states_that_take_long_are_written_seldom(small_model, tmp_path, monkeypatch):
    """Those of the first block stay; what was quantized since then is again, and all ends in the same bytes."""
    write(small_model.path, tmp_path / "whole", "gptq")
    monkeypatch.setattr(states, "QUICK", 0.0)
    monkeypatch.setattr(states, "SHARE", 1e-9)

    def killed(part):
        if part == "block_1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(small_model.path, tmp_path / "q", "gptq", on_part=killed)
    assert {"block_1.safetensors", "states-1.safetensors"} < set(contents(tmp_path / "q"))
    made, kept = [], []
    write(small_model.path, tmp_path / "q", "gptq", resume=True, on_part=made.append, on_kept=kept.append)
    assert (kept, made[0]) == (["embed", "block_0", "block_1"], "block_2")
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_how_often_states_are_due(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(states.time, "monotonic", lambda: now[0])
    pace = states.Pace()
    assert pace.due, "after the first block"
    with pace.writing():
        now[0] += 0.5
    assert pace.due, "quick"
    with pace.writing():
        now[0] += 3.0
    now[0] += 59.0
    assert not pace.due, "a twentieth of the time is 60 seconds"
    now[0] += 1.0
    assert pace.due


def test_a_refusal_takes_back_its_states_too(small_model, tmp_path):
    """Of a new write nothing is left; one that went on with another is back where it began, and can be gone on with."""
    leaves = flatten_dict(small_model.params, sep="/")
    up = leaves["block_2/mlp/up_proj/kernel"]
    damaged = unflatten_dict({**leaves, "block_2/mlp/up_proj/kernel": up.at[0, 0].set(np.nan)}, sep="/")

    def killed(part):
        if part == "block_0":
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="block_2/mlp/up_proj: a weight is NaN"):
        write(small_model.path, tmp_path / "q", "gptq", damaged)
    assert not (tmp_path / "q").exists()
    with pytest.raises(KeyboardInterrupt):
        write(small_model.path, tmp_path / "q", "gptq", on_part=killed)
    before, made = contents(tmp_path / "q"), []
    assert {"block_0.safetensors", "states-1.safetensors"} < set(before)
    with pytest.raises(UserError, match="block_2/mlp/up_proj: a weight is NaN"):
        write(small_model.path, tmp_path / "q", "gptq", damaged, resume=True, on_part=made.append)
    assert made == ["block_1"]
    assert contents(tmp_path / "q") == before
    write(small_model.path, tmp_path / "whole", "gptq")
    write(small_model.path, tmp_path / "q", "gptq", resume=True)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def command(model, text, out) -> list[str]:
    calibration = ["--calibration", str(text), "--samples", "4", "--length", "32"]
    widths = ["--bits", "3", "--group-size", "32", "--method", "gptq"]
    return [sys.executable, "-m", "lq", "quantize", str(model), *widths, *calibration, "--out", str(out)]


@pytest.fixture(scope="module")
def undisturbed(small_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "q"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command(small_model.path, text_file, out), env=environment, check=True, capture_output=True)
    return out


def test_killed_by_the_system(small_model, text_file, tmp_path, undisturbed):
    """SIGKILL as soon as the second block is there; the command again, with --resume."""
    environment, out = {**os.environ, "JAX_PLATFORMS": "cpu"}, tmp_path / "killed"
    again = command(small_model.path, text_file, out)
    process = subprocess.Popen(again, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (out / "block_1.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "lq.json").exists()
    resumed = subprocess.run([*again, "--resume"], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "block_0, kept" in resumed.stderr
    shown = [line for line in resumed.stderr.splitlines() if " left, " in line]
    assert shown, "time left is shown for each block"
    assert not any("kept" in line or "embed" in line for line in shown), "and measured on those that took work"
    assert contents(out) == contents(undisturbed)
