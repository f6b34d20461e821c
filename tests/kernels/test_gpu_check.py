"""The GPU check's own logic, on a CPU: tiny shapes, kernels interpreted.

Its figures mean nothing here and are not looked at; that every stage runs, judges and writes what it found is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lq_kernels.gpu import OLDEST_JAX

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "gpu_check.py"


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    # Before the version of JAX that the GPU kernel needs, the same logic is run on the TPU's.
    backend = "mosaic_gpu" if jax.__version_info__ >= OLDEST_JAX else "mosaic_tpu"
    out = tmp_path_factory.mktemp("check")
    done = run("--smoke", "--minutes", "20", "--backend", backend, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu_check.json").read_text(encoding="utf-8")), done.stdout, out


def test_products_are_checked_against_float64(results):
    found, printed, _ = results
    assert found["numerics"]["run"] == 1
    assert found["numerics"]["failures"] == []
    assert "numerics: 1 cases, 0 failed, 0 not run" in printed


def test_the_best_candidate_is_written_to_the_table(results):
    found, _, out = results
    (problem,) = found["tuning"]["problems"]
    best = problem["outcomes"][0]
    assert best["timing"]["median"] is not None
    (table,) = (out / "tables").glob("*.json")
    (entries,) = json.loads(table.read_text(encoding="utf-8"))["entries"].values()
    assert entries == {problem["problem"]: best["config"]}


def test_a_decoding_step_is_timed_dense_and_packed(results):
    found, _, _ = results
    assert [step["bits"] for step in found["decoding"]["steps"]] == [None, 3]
    assert found["decoding"]["left"] == []


def test_products_are_timed_beside_what_they_are_measured_against(results):
    found, printed, _ = results
    timed = {p["method"]: p for p in found["products"]["products"]}
    assert list(timed) == ["bf16", "xla int4 cast", "xla int4 scaled after", "W2"]
    assert all(p["failure"] is None for p in timed.values())
    assert found["products"]["left"] == 0
    assert "x bf16" in printed


def test_what_there_is_no_time_for_is_said(tmp_path):
    done = run("--smoke", "--minutes", "0", "--backend", "xla", "--out", tmp_path)
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert (found["numerics"]["run"], found["numerics"]["left"]) == (0, 1)
    assert found["tuning"]["left"] == ["W2 128x128 M1"]
    assert found["decoding"]["left"] == [None, 3]
    assert found["products"]["left"] == 4
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "1 products not checked: no time was left"


def test_torch_is_absent_with_its_reason(results):
    found, _, _ = results
    assert found["torch"]["absent"] in ("torch is not installed", "torch sees no CUDA device")


def test_the_environment_is_recorded(results):
    found, _, _ = results
    assert found["environment"]["versions"]["jax"] == jax.__version__
    assert found["copy_bytes_per_second"] > 0


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "gpu_check: no GPU here; --smoke exercises the logic on a CPU"
    assert not (tmp_path / "none").exists()
