"""What can't be written is one line that says how to go on, and nothing is lost.

The size that a file of a process may have is limited: to a program that is a disk which is full, but for the number.
"""

import os
import subprocess
import sys

import pytest
import yaml

pytestmark = pytest.mark.once


LIMITED = """
import resource, sys
from lq.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
del sys.argv[1]
main()
"""


def limited(limit: int | None, *command: object) -> subprocess.CompletedProcess:
    """The command, which may write files of so many bytes."""
    start = ["-m", "lq"] if limit is None else ["-c", LIMITED, str(limit)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, *start, *map(str, command)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


def contents(directory) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_quantizing_onto_a_full_disk(small_model, tmp_path):
    quantize = ["quantize", small_model.path, "--bits", "3", "--group-size", "32", "--quiet", "--out"]
    largest = (small_model.path / "model.safetensors").stat().st_size // 100
    done = limited(largest, *quantize, tmp_path / "q")
    assert done.returncode == 2
    shard = tmp_path / "q" / "embed.safetensors"
    assert done.stderr.endswith(
        f"lq: {shard}: File too large; make room, then go on with: lq quantize {small_model.path} --bits 3 "
        f"--group-size 32 --quiet --out {tmp_path / 'q'} --resume\n"
    )
    assert contents(tmp_path / "q").keys() == {"shards.json"}
    assert limited(None, *quantize, tmp_path / "q", "--resume").returncode == 0
    assert limited(None, *quantize, tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_a_run_on_a_full_disk(small_model, text_file, tmp_path):
    text = {"data": str(text_file), "window": 32, "windows": 2}
    allocation = {"budgets": [3.5], "orders": ["zd"]}
    config = {"model": str(small_model.path), "evaluation": text, "allocation": allocation, "output": "r"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    run = ["run", tmp_path / "x.yaml", "--quiet", "--set"]
    done = limited(12_000, *run, f"output={tmp_path / 'r'}")
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"lq: {tmp_path / 'r' / 'report.png'}: File too large; make room, then go on with: lq run ")
    assert said.endswith(" --resume")
    assert limited(None, *run, f"output={tmp_path / 'r'}", "--resume").returncode == 0
    assert limited(None, *run, f"output={tmp_path / 'whole'}").returncode == 0
    ours, whole = (contents(tmp_path / name) for name in ("r", "whole"))
    assert ours.keys() == whole.keys()
    assert all(ours[name] == data for name, data in whole.items() if name not in ("run.json", "config.yaml"))
