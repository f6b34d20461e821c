"""Several processes that are one run: the same numbers as one process, on CPU collectives."""

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once


def together(count: int, devices: int, *arguments) -> list[subprocess.CompletedProcess]:
    """The command in `count` processes of so many virtual devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    command = [sys.executable, "-m", "lq", *map(str, arguments)]
    if count > 1:
        commands = [[*command, "--distributed", f"{address},{number},{count}"] for number in range(count)]
    else:
        commands = [command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen(command, **pipes) for command in commands]
    outputs = [process.communicate(timeout=300) for process in running]
    results = zip(running, outputs, strict=True)
    return [subprocess.CompletedProcess(p.args, p.returncode, *output) for p, output in results]


def numbers(done: subprocess.CompletedProcess) -> list[float]:
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return [float(line[-1]) for line in lines if line[0] in ("perplexity", "KL", "top-1")]


def test_two_processes_measure_what_one_does(small_model, text_file):
    evaluate = ["eval", small_model.path, "--data", text_file, "--window", "32", "--windows", "8"]
    evaluate += ["--original", small_model.path, "--mesh", "data=2,tensor=2"]
    (alone,) = together(1, 4, *evaluate)
    first, second = together(2, 2, *evaluate)
    assert len(numbers(alone)) == 3
    assert numbers(first) == numbers(second)
    assert numbers(first) == pytest.approx(numbers(alone), rel=1e-5, abs=1e-7)


def test_two_processes_write_what_one_does(small_model, tmp_path):
    """Each shard by one of them; and what is in the way is refused by both."""
    quantize = [
        "quantize",
        small_model.path,
        "--bits",
        "3",
        "--group-size",
        "32",
        "--quiet",
        "--mesh",
        "data=2,tensor=2",
    ]
    (alone,) = together(1, 4, *quantize, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr[-2000:]
    for done in together(2, 2, *quantize, "--out", tmp_path / "both"):
        assert done.returncode == 0, done.stderr[-2000:]
    written = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("alone", "both")]
    assert written[0] == written[1]
    for done in together(2, 2, *quantize, "--out", tmp_path / "both"):
        assert done.returncode == 2
        assert done.stderr.endswith("already holds a finished checkpoint; give another --out or remove it\n")


@pytest.mark.parametrize("given", ["localhost:1234", "localhost:1234,2,2", "localhost:1234,x,2"])
def test_what_is_no_process(small_model, given):
    (done,) = together(1, 2, "eval", small_model.path, "--mesh", "tensor=2", "--distributed", given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lq: --distributed {given}: write HOST:PORT,NUMBER,COUNT such as host0:8476,0,4")
    (done,) = together(1, 2, "eval", small_model.path, "--distributed", given)
    assert done.returncode == 2
    assert done.stderr.startswith("lq: --distributed: without --mesh every process would compute the same")
