"""Models on meshes: the same logits as on one device, a share of the bytes on each, and no weight gathered whole."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import FAMILIES

pytestmark = pytest.mark.once


SIBLINGS = ("mistral", "qwen2", "qwen3", "phi3", "gemma2")  # of llama and gemma3_text: the same layers, cut alike
EVERY = [pytest.param(name, marks=pytest.mark.long) if name in SIBLINGS else name for name in FAMILIES]
CALIBRATED = ("data=8", "data=4,tensor=2", "data=2,tensor=4", "tensor=8")


@functools.cache
def on_meshes(family: str, *calibrated: str) -> dict:
    script = Path(__file__).parent / "on_eight_devices.py"
    command = [sys.executable, script, family, *calibrated]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def meshes_of(family: str) -> tuple[str, ...]:
    """Those that a family is calibrated on: all of one dense and one routed one, of others one."""
    return CALIBRATED if family in ("llama", "mixtral") else CALIBRATED[1:2]


def check_calibrated(found: dict) -> None:
    """Codes that depend on weights alone are the same to the bit; a mean is summed in another order.

    GPTQ's codes go by sums over all text, and each by the rounding of those before it: one tie that falls the other
    way changes what follows. How much it leaves of the outputs stays the same.
    """
    for mesh, measured in found.items():
        assert measured.pop("gptq") < 0.25, mesh
        assert measured.pop("gptq error") < 0.02, mesh
        assert measured == {"lim": pytest.approx(0, abs=1e-6), "zd": 0, "rtn": 0}, mesh


def sizes(mesh: str) -> dict[str, int]:
    return {axis: int(size) for axis, size in (item.split("=") for item in mesh.split(","))}


@pytest.mark.parametrize("family", EVERY)
def test_logits_bytes_and_gathers(family):
    found = on_meshes(family, *meshes_of(family))["meshes"]
    assert {name.split(" ")[0] for name in found} == {"dense", "packed"}
    for name, measured in found.items():
        kind, mesh = name.split(" ")
        axes = sizes(mesh)
        # Sums in another order; what is dense here has logits that cancel more.
        assert measured["difference"] < (1e-5 if kind == "packed" else 3e-5), name
        if "fsdp" not in axes:
            assert measured["gathered"] == [], name
        elif kind == "packed":
            assert all(leaf.startswith(("('u32'", "('bf16'")) for leaf in measured["gathered"]), name
        apart = axes.get("tensor", 1) * axes.get("fsdp", 1)
        if "expert" not in axes:  # norms and learned positions are on every device
            whole = 0.1 if family in ("gpt2", "opt") else 0.025
            assert 1 / apart <= measured["share"] <= whole + (1 - whole) / apart + 1e-9, name
        else:  # attention and tables are not apart along experts
            assert measured["share"] < 0.65 / apart, name


@pytest.mark.parametrize("family", EVERY)
def test_text_is_the_same_and_caches_are_apart(family):
    """Rows over 4 devices, key/value heads over 2."""
    found = on_meshes(family, *meshes_of(family))
    assert found["same text"]
    assert found["laid out"] < 1e-5
    assert found["cache"] == [[0.125], [0.125]]


@pytest.mark.parametrize("family", EVERY)
def test_scores_and_codes_are_the_same(family):
    found = on_meshes(family, *meshes_of(family))["calibrated"]
    assert found.keys() == set(meshes_of(family))
    check_calibrated(found)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"llama", "mixtral"}))
def test_scores_and_codes_are_the_same_on_every_mesh(family):
    check_calibrated(on_meshes(family, *CALIBRATED)["calibrated"])
