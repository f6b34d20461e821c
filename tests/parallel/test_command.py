"""The command on meshes of 8 virtual CPU devices."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once


def lq(*arguments, devices: int = 8):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, "-m", "lq", *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_shards_and_numbers_are_those_of_one_device(small_model, text_file, tmp_path):
    how = ["--bits", "3", "--group-size", "32", "--quiet", "--out"]
    shards, numbers = [], []
    for name, mesh in (("one", []), ("many", ["--mesh", "data=2,tensor=2,fsdp=2"])):
        done = lq("quantize", small_model.path, *how, tmp_path / name, *mesh)
        assert done.returncode == 0, done.stderr
        shards.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")})
        evaluate = ["--data", text_file, "--window", "32", "--windows", "8", "--original", small_model.path]
        done = lq("eval", tmp_path / name, *evaluate, *mesh)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        numbers.append([line[-1] for line in lines if line[0] in ("perplexity", "KL")])
    assert shards[0] == shards[1]
    assert [float(n) for n in numbers[0]] == pytest.approx([float(n) for n in numbers[1]], rel=1e-5)


def test_a_mesh_of_another_number_of_devices(small_model):
    done = lq("eval", small_model.path, "--mesh", "tensor=3")
    assert done.returncode == 2
    assert done.stderr == "lq: mesh: tensor=3 takes 3 devices, and there are 8\n"
    done = lq("eval", small_model.path, "--mesh", "tensr=8")
    assert done.returncode == 2
    assert done.stderr.startswith("lq: mesh: 'tensr=8'; write axes once, of data, fsdp, expert, tensor")
