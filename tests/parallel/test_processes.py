"""Several processes that are one run: the same numbers as one process, on CPU collectives."""

import os
import socket
import subprocess
import sys
import time

import pytest
import yaml

pytestmark = pytest.mark.once


def started(count: int, devices: int, *arguments, cwd=None) -> list[subprocess.Popen]:
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
    return [subprocess.Popen(command, cwd=cwd, **pipes) for command in commands]


def together(*args, **kwargs) -> list[subprocess.CompletedProcess]:
    """The same, to their end."""
    running = started(*args, **kwargs)
    outputs = [process.communicate(timeout=600) for process in running]
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


@pytest.fixture(scope="module")
def config(small_model, text_file, tmp_path_factory):
    """Of a calibrated run; its output is relative to where a command runs."""
    fields = {
        "model": str(small_model.path),
        "output": "run",
        "calibration": {"data": str(text_file), "samples": 4, "length": 32, "batch_size": 4},
        "evaluation": {"data": str(text_file), "window": 32, "windows": 4, "batch_size": 4},
        "quantization": {"method": "gptq", "group_size": 32},
        "allocation": {"bits": [2, 4], "budgets": [3.5], "orders": ["lim", "zd"]},
        "save_blocks": True,
    }
    file = tmp_path_factory.mktemp("config") / "x.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def artifacts(place) -> dict[str, bytes]:
    """Every file of a run but the record of what it took."""
    files = [file for file in (place / "run").rglob("*") if file.is_file() and file.name != "run.json"]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The artifacts of one process with four devices."""
    place = tmp_path_factory.mktemp("alone")
    (done,) = together(1, 4, "run", config, "--mesh", "data=2,tensor=2", cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    return artifacts(place)


@pytest.mark.parametrize("dies", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_process_that_dies_ends_the_other_and_both_go_on_to_the_bytes_of_one(config, alone, tmp_path, dies):
    run = ["run", config, "--mesh", "data=2,tensor=2"]
    running = started(2, 2, *run, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("run/unfinished/*/block_1.safetensors")) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in running)
        time.sleep(0.05)
    running[dies].kill()
    killed = time.monotonic()
    said = running[1 - dies].communicate(timeout=300)[1]
    running[dies].communicate()
    assert time.monotonic() - killed < 60, "and not the minutes after which JAX would give up"
    assert running[1 - dies].returncode == 75, said[-2000:]
    (line,) = [line for line in said.splitlines() if line.startswith("lq:")]
    assert line.startswith("lq: another process of this run has ended, see what it said; go on with: lq run ")
    assert line.endswith(" --resume")
    assert artifacts(tmp_path).keys() != alone.keys()
    for done in together(2, 2, *run, "--resume", cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-2000:]
    assert artifacts(tmp_path) == alone


@pytest.mark.long
def test_four_processes_run_what_one_does(config, alone, tmp_path):
    for done in together(4, 1, "run", config, "--mesh", "data=2,tensor=2", cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-2000:]
    assert artifacts(tmp_path) == alone


@pytest.mark.parametrize("given", ["localhost:1234", "localhost:1234,2,2", "localhost:1234,x,2"])
def test_what_is_no_process(small_model, given):
    (done,) = together(1, 2, "eval", small_model.path, "--mesh", "tensor=2", "--distributed", given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lq: --distributed {given}: write HOST:PORT,NUMBER,COUNT such as host0:8476,0,4")
    (done,) = together(1, 2, "eval", small_model.path, "--distributed", given)
    assert done.returncode == 2
    assert done.stderr.startswith("lq: --distributed: without --mesh every process would compute the same")
