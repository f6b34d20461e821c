"""The tuner: every candidate has an outcome, the best is written beside what was there, bad arguments get one line."""

import dataclasses
import json
import math
import time

import jax.numpy as jnp
import pytest

from lq_kernels import tune, tuning
from lq_kernels.registry import load_backend
from lq_kernels.xla_scan import ScanConfig


def tuned(backend, **options):
    w = tune.random_packed(2, 256, 64, 64)
    return tune.tune(backend, w, 3, x_dtype=jnp.float32, cache_bytes=0, repeats=2, **options)


def test_every_candidate_is_timed_fastest_first():
    problem, outcomes = tuned(load_backend("xla_scan"))
    assert tuning.key(problem) == "2g64a K256 N64 M4 float32"
    assert {o.config for o in outcomes} == {ScanConfig(chunk) for chunk in (128, 256, 512, 1024, 2048)}
    times = [o.timing.program for o in outcomes]
    assert times == sorted(times)
    assert times[0] > 0


def test_a_candidate_that_breaks_is_kept_with_its_reason():
    scan = load_backend("xla_scan")
    broken = dataclasses.replace(scan, candidates=lambda problem, target: [ScanConfig(math.inf), ScanConfig(128)])
    _, outcomes = tuned(broken)
    assert [o.config for o in outcomes] == [ScanConfig(128), ScanConfig(math.inf)]
    assert outcomes[0].failure is None
    assert outcomes[1].timing is None
    assert outcomes[1].failure.startswith("OverflowError: ")


def test_after_the_deadline_nothing_is_run():
    _, outcomes = tuned(load_backend("xla_scan"), deadline=time.monotonic() - 1, limit=2)
    assert [o.failure for o in outcomes] == ["TimeoutError: no time left to compile it"] * 2


def test_the_command_writes_a_table_that_is_then_used(tmp_path, monkeypatch, capsys):
    arguments = ["--backend", "xla_scan", "--shapes", "256x64", "--bits", "2,3", "--rows", "3", "--group", "64"]
    arguments += ["--dtype", "float32", "--cache-mb", "0", "--repeats", "2", "--out", str(tmp_path)]
    assert tune.main(arguments) == 0
    table = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert list(table["entries"]["xla_scan"]) == ["2g64a K256 N64 M4 float32", "3g64a K256 N64 M4 float32"]
    assert capsys.readouterr().out.count(" -> ") == 2
    monkeypatch.setenv("LQ_KERNELS_TABLES", str(tmp_path))
    tuning.forget()
    problem, _ = tuned(load_backend("xla_scan"), limit=1)
    assert tuning.lookup(load_backend("xla_scan"), problem) is not None
    monkeypatch.delenv("LQ_KERNELS_TABLES")
    assert tuning.lookup(load_backend("xla_scan"), problem) is None


def test_a_second_run_leaves_other_entries_alone(tmp_path):
    scan = load_backend("xla_scan")
    problem, _ = tuned(scan, limit=1)
    other = dataclasses.replace(problem, rows=16)
    tune.write_entry(tmp_path, scan, problem, ScanConfig(128))
    file = tune.write_entry(tmp_path, scan, other, ScanConfig(256))
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]["xla_scan"]
    assert {fields["chunk"] for fields in entries.values()} == {128, 256}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--shapes", "4096"], "'4096'; write KxN, several with commas, as in 4096x4096,4096x14336"),
        (["--rows", "1;2"], "'1;2'; write whole numbers with commas between them, as in 1,16"),
        (["--backend", "cublas"], "invalid choice: 'cublas'"),
        (["--bits", "2,9"], "argument --bits: 9 bits; a code has 1 to 8"),
        (["--out", "/proc/tables"], "argument --out: /proc/tables: No such file or directory; write a folder that can"),
        (["--group", "0"], "argument --group: '0'; write 1 or more"),
        (["--repeats", "0"], "argument --repeats: '0'; write 2 or more"),
        (["--cache-mb", "-1"], "argument --cache-mb: '-1'; write a whole number"),
        (["--backend", "mosaic_gpu", "--shapes", "128x128"], "mosaic_gpu: runs on cuda, not on cpu"),
    ],
)
def test_wrong_arguments(argument, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(argument)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
