"""A small experiment from end to end, interrupted, resumed, and refused where it does not belong."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import time

import jax.numpy as jnp
import pytest
from small_models import llama_config, random_params, write_directory

from lq.checkpoint import write as writing
from lq.checkpoint.layout import to_tensors
from lq.errors import UserError
from lq.importance import score
from lq.lock import held
from lq.models.matrices import parameter_count
from lq.progress import Progress
from lq.runs import journal as journal_module
from lq.runs.config import Experiment, dump_experiment, load_experiment
from lq.runs.experiment import Run, run_experiment
from lq.runs.journal import Journal
from lq.runs.results import Results, Row
from lq.sealed import sealed, unsealed

pytestmark = pytest.mark.once


def experiment_for(small_model, text_file, out, **changes):
    config = {
        "model": str(small_model.path),
        "output": str(out),
        "calibration": {"data": str(text_file), "samples": 4, "length": 32},
        "evaluation": {"data": str(text_file), "window": 32, "windows": 4, "batch_size": 4},
        "quantization": {"group_size": 64},
        "allocation": {
            "bits": [2, 4],
            "budgets": [3.0],
            "orders": ["lim", "zd", {"metric": "random", "seeds": 2}, {"metric": "lim", "reverse": True}],
        },
        "baselines": {"uniform": [4, 2]},
        "moves": {"high": 4, "low": 2, "orders": ["lim"]},
    }
    return Experiment.model_validate({**config, **changes})


def contents(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def copy_run(source, target):
    """The record of a run, so that it can be resumed elsewhere."""
    target.mkdir()
    for name in ("run.json", "config.yaml", "rows.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())


@pytest.fixture(scope="module")
def finished(small_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    experiment = experiment_for(small_model, text_file, out)
    return out, experiment, run_experiment(experiment)


def test_the_run_directory_holds_everything(finished):
    out, _, results = finished
    names = {file.name for file in out.iterdir()}
    assert names >= {
        "config.yaml",
        "run.json",
        "rows.jsonl",
        "results.json",
        "report.html",
        "report.png",
        "results.csv",
    }
    assert {f.name for f in (out / "scores").iterdir()} == {
        "lim.json",
        "zd.json",
        "random_0.json",
        "random_1.json",
        "reverse_lim.json",
    }
    assert Results.read(out / "results.json") == results
    with (out / "results.csv").open() as f:
        assert len(list(csv.DictReader(f))) == len(results.rows)


def test_every_plan_is_a_file_where_two_are_the_same_model_too(finished):
    names = {row.name for row in finished[2].rows if row.group != "original"}
    assert {file.stem for file in (finished[0] / "plans").iterdir()} == {name.replace(" ", "_") for name in names}


def test_the_protocol_counts_the_scored_tokens(finished, small_model, text_file, tmp_path):
    assert finished[2].protocol["scored tokens"] == 4 * 31  # the first of a window is not predicted
    evaluation = {"data": str(text_file), "window": 32, "stride": 8, "windows": 4, "batch_size": 4}
    run = Run(experiment_for(small_model, text_file, tmp_path / "r", evaluation=evaluation), Progress(quiet=True))
    assert run.results({}, []).protocol["scored tokens"] == 31 + 3 * 8


def test_rows_are_the_sweep(finished):
    rows = {row.name: row for row in finished[2].rows}
    assert {"original", "uniform 4", "uniform 2", "lim @ 3", "zd @ 3", "random 0 @ 3", "random 1 @ 3"} <= set(rows)
    assert rows["original"].kl == pytest.approx(0, abs=1e-6)
    assert rows["uniform 2"].kl > rows["uniform 4"].kl > 0
    assert rows["lim @ 3"].bpw == rows["zd @ 3"].bpw <= 3.0
    moves = [row for row in finished[2].rows if row.group == "move"]
    assert [row.code_bits for row in moves] == pytest.approx([4, 4 - 2 / 3, 4 - 4 / 3, 2])
    assert moves[0].perplexity == rows["uniform 4"].perplexity
    assert moves[-1].perplexity == rows["uniform 2"].perplexity


def test_the_conclusion_is_computed_and_printed_as_it_is(finished):
    conclusion = finished[2].conclusion
    assert conclusion.startswith("This run compares with 2 random orders, and it takes 3 or more")
    assert conclusion in (finished[0] / "report.html").read_text()


def test_an_existing_run_is_neither_repeated_nor_overwritten(finished):
    out, experiment, _ = finished
    before = (out / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds this run; add --resume"):
        run_experiment(experiment)
    assert (out / "rows.jsonl").read_bytes() == before


def test_another_config_or_model_is_refused(finished, small_model, text_file):
    out, *_ = finished
    other = experiment_for(small_model, text_file, out, quantization={"group_size": 32})
    with pytest.raises(UserError, match="a run of another config"):
        run_experiment(other, resume=True)
    whole = (out / "run.json").read_bytes()
    record = unsealed(json.loads(whole))
    code = {**record["code"], "lq": "0.0.9, sources 0123456789ab"}
    try:
        for change, message in (
            ({"model": "other"}, "a run of another model; give another output or remove it"),
            ({"code": code}, "a run of other code (lq (0.0.9, sources 0123456789ab there, "),
            ({"code": None}, "a run of other code (lq (nothing there, "),
        ):
            (out / "run.json").write_text(json.dumps(sealed({**record, **change})))
            with pytest.raises(UserError, match=re.escape(message)):
                run_experiment(finished[1], resume=True)
    finally:
        (out / "run.json").write_bytes(whole)


def test_a_foreign_directory_is_refused(small_model, text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty, and no run of lq"):
        run_experiment(experiment_for(small_model, text_file, tmp_path))


def test_a_killed_run_resumes_to_the_same_numbers(finished, small_model, text_file, tmp_path):
    out, _, results = finished
    experiment = experiment_for(small_model, text_file, tmp_path / "r")
    copy_run(out, tmp_path / "r")
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r" / "rows.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed while writing a line
    resumed = run_experiment(experiment, resume=True)
    assert [row.name for row in resumed.rows] == [row.name for row in results.rows]
    assert [row.perplexity for row in resumed.rows] == [row.perplexity for row in results.rows]
    assert {file: data for file, data in contents(tmp_path / "r").items() if file != "run.json"} == {
        file: data for file, data in contents(out).items() if file != "run.json"
    } | {"config.yaml": (tmp_path / "r" / "config.yaml").read_bytes()}


@pytest.fixture
def measured_again(finished, monkeypatch):
    """Names of the models that are measured; the numbers are those of the finished run."""
    names = []
    rows = {row.name: row for row in finished[2].rows}

    def measure(run, candidate, reference):
        names.append(candidate.name)
        return rows[candidate.name]

    monkeypatch.setattr(Run, "_measure", measure)
    monkeypatch.setattr(Run, "_reference", lambda run: "reference")
    return names


DAMAGED = [b'{"name": "unif', b"{}", b"[]", b"null", b'"text"', b"\xff\x00", b'{"name": "x"}', b""]


def with_wrong_types(line):
    """The row of a line, with a value of another type in each of its fields that the report computes with."""
    wrong = {"perplexity": ["12", None, True], "bpw": ["4", None], "kl": ["0"], "bits_per_block": [None, ["4"], 4.0]}
    wrong |= {"bytes_on_device": [1.5], "group": ["others"], "seed": ["0"], "name": [3], "more": [0]}
    row = unsealed(json.loads(line))
    return [json.dumps({**row, field: value}).encode() for field, values in wrong.items() for value in values]


def test_a_row_of_wrong_types_is_measured_again(finished, measured_again, small_model, text_file, tmp_path):
    copy_run(finished[0], tmp_path / "r")
    first, changed, *rest = (finished[0] / "rows.jsonl").read_bytes().splitlines()
    (tmp_path / "r" / "rows.jsonl").write_bytes(b"\n".join([first, *with_wrong_types(changed), *rest]) + b"\n")
    resumed = run_experiment(experiment_for(small_model, text_file, tmp_path / "r"), resume=True)
    assert resumed.rows == finished[2].rows
    assert measured_again == [json.loads(changed)["name"]]


def test_a_results_file_of_wrong_types_is_one_line(finished, tmp_path):
    data = unsealed(json.loads((finished[0] / "results.json").read_text()))
    for row in with_wrong_types(json.dumps(data["rows"][1])):
        (tmp_path / "results.json").write_text(json.dumps({**data, "rows": [data["rows"][0], json.loads(row)]}))
        with pytest.raises(UserError) as error:
            Results.read(tmp_path / "results.json")
        assert str(error.value).startswith(
            f"{tmp_path}/results.json: not a results file of this version of lq (rows.1."
        )
        assert "\n" not in str(error.value)


def test_rows_that_are_no_numbers_read_back(finished, tmp_path):
    row = dataclasses.replace(finished[2].rows[1], perplexity=math.inf, kl=-math.inf)
    dataclasses.replace(finished[2], rows=(row,)).write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").rows == (row,)
    nan = dataclasses.replace(row, perplexity=math.nan)
    assert math.isnan(Row.from_json(json.dumps(dataclasses.asdict(nan))).perplexity)


def test_damaged_lines_cost_their_own_rows_and_no_others(
    finished, measured_again, small_model, text_file, tmp_path, capsys
):
    out, _, results = finished
    copy_run(out, tmp_path / "r")
    first, lost, *rest = (out / "rows.jsonl").read_bytes().splitlines()
    (tmp_path / "r" / "rows.jsonl").write_bytes(b"\n".join([first, *DAMAGED, *rest]) + b"\n")
    resumed = run_experiment(experiment_for(small_model, text_file, tmp_path / "r"), resume=True, progress=Progress())
    assert resumed.rows == results.rows
    assert measured_again == [json.loads(lost)["name"]]
    assert f"rows.jsonl: {len(DAMAGED)} damaged lines left out and measured again" in capsys.readouterr().err
    assert len((tmp_path / "r" / "rows.jsonl").read_text().splitlines()) == len(results.rows)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{", b"\xff"])
def test_a_damaged_record_is_one_line(finished, small_model, text_file, tmp_path, content):
    copy_run(finished[0], tmp_path / "r")
    (tmp_path / "r" / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: damaged; remove .* or give another output"):
        run_experiment(experiment_for(small_model, text_file, tmp_path / "r"), resume=True)


def test_time_and_memory_are_those_of_all_sessions(finished, measured_again, small_model, text_file, tmp_path):
    out = tmp_path / "r"
    copy_run(finished[0], out)
    record = unsealed(json.loads((out / "run.json").read_text()))
    assert 0 < sum(record["row_seconds"].values()) < record["seconds"]
    assert record["row_seconds"].keys() == {row.name for row in finished[2].rows}
    (out / "run.json").write_text(json.dumps({**record, "seconds": 5000.0, "peak_memory_bytes": 10**15}))
    run_experiment(experiment_for(small_model, text_file, out), resume=True)
    record = json.loads((out / "run.json").read_text())
    assert 5000 < record["seconds"] < 6000
    assert record["peak_memory_bytes"] == 10**15
    run_experiment(experiment_for(small_model, text_file, out), overwrite=True)
    assert json.loads((out / "run.json").read_text())["seconds"] < 1000, "measured anew, counted anew"


def test_an_interrupted_session_leaves_its_time(finished, small_model, text_file, tmp_path, monkeypatch):
    def interrupted(run, candidate, reference):
        if candidate.name != "original":
            raise KeyboardInterrupt
        return finished[2].rows[0]

    monkeypatch.setattr(Run, "_measure", interrupted)
    monkeypatch.setattr(Run, "_reference", lambda run: time.sleep(0.5))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment_for(small_model, text_file, tmp_path / "r"))
    assert json.loads((tmp_path / "r" / "run.json").read_text())["seconds"] > 0.5


def test_without_a_score_that_needs_it_no_calibration_text_is_read(small_model, text_file, tmp_path):
    changes = {"calibration": {"data": "none.txt", "length": 10_000}, "moves": None, "baselines": {}}
    allocation = {"budgets": [3.0], "orders": ["zd", {"metric": "random", "options": {"seed": 7}}]}
    results = run_experiment(experiment_for(small_model, text_file, tmp_path / "r", allocation=allocation, **changes))
    assert [row.name for row in results.rows] == ["original", "zd @ 3", "random 7 @ 3"]
    assert results.protocol["calibration"] is None
    assert results.environment["seeds"] == {"calibration seed": None, "seeds of random orders": [7]}
    assert "calibration" not in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize(
    ("calibration", "orders", "batch_size"),
    [
        ({}, ["lim", {"metric": "lim", "reverse": True}], 8),
        ({"batch_size": 2}, [{"metric": "lim", "reverse": True}, "zd", "lim"], 2),
        ({"batch_size": 2}, [{"metric": "lim", "options": {"batch_size": 3}}, {"metric": "lim", "reverse": True}], 3),
    ],
)
def test_an_order_and_its_reverse_are_scored_once(
    small_model, text_file, tmp_path, monkeypatch, calibration, orders, batch_size
):
    scored = []

    def counted(source, metric, windows, options):
        scored.append((metric, options))
        return score(source, metric, windows, options)

    monkeypatch.setattr("lq.runs.experiment.score", counted)
    changes = {"calibration": {"data": str(text_file), "samples": 4, "length": 32, **calibration}, "moves": None}
    allocation = {"budgets": [3.0], "orders": orders}
    experiment = experiment_for(small_model, text_file, tmp_path / "r", allocation=allocation, **changes)
    quiet = Progress(quiet=True)
    run = Run(experiment, quiet)
    with Journal.opened(run.directory, run.identity(), resume=False, overwrite=False, progress=quiet) as journal:
        scores = run.scores(journal)
    assert [options for metric, options in scored if metric == "lim"] == [{"batch_size": batch_size}]
    assert all(options == {} for metric, options in scored if metric == "zd")
    assert scores["reverse lim", None].ranking() == scores["lim", None].ranking()[::-1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_original_is_as_large_as_it_is_stored(text_file, tmp_path, dtype):
    config = llama_config(1)
    model = write_directory(tmp_path / "model", config, random_params(config, dtype=dtype))
    evaluation = {"data": str(text_file), "window": 32, "windows": 2}
    (row,) = run_experiment(
        Experiment.model_validate({"model": str(model), "output": str(tmp_path / "r"), "evaluation": evaluation})
    ).rows
    itemsize = jnp.dtype(dtype).itemsize
    assert row.bpw == row.code_bits == 8 * itemsize
    assert row.bytes_on_device == itemsize * parameter_count(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluation": {"data": "none.txt", "window": 129}},
            "evaluation.window of 129 tokens: the model's context is 128",
        ),
        ({"calibration": {"data": "none.txt", "length": 129}}, "calibration.length of 129 tokens: the model's context"),
    ],
)
def test_windows_beyond_the_context_stop_before_anything_is_read(small_model, text_file, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_experiment(experiment_for(small_model, text_file, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"allocation": {"bits": [2, 4], "budgets": [3, 0.5], "orders": ["zd"]}},
            "allocation.budgets.1: 0.5 bits per weight cannot be met; widths 2, 4 (scales",
        ),
        ({"allocation": {"head_bits": 4}}, "allocation.head_bits: this model's head is its embedding; write embedding"),
        ({"model": "nowhere/at/all"}, "model: nowhere/at/all: "),
        ({"calibration": {"data": "none.txt", "length": 32}}, "calibration.data: none.txt: no such text file; give a"),
        ({"evaluation": {"data": "none.txt", "window": 32}}, "evaluation.data: none.txt: no such text file; give a"),
        ({"output": "{text}/r"}, "output: {text}/r: cannot be written ("),
        ({"output": "{text}"}, "output: {text}: cannot be written ("),
    ],
)
def test_what_cannot_be_run_is_one_line_with_file_and_key(small_model, text_file, tmp_path, changes, message):
    if "output" in changes:
        changes = {"output": changes["output"].format(text=text_file)}
    config = tmp_path / "x.yaml"
    config.write_text(dump_experiment(experiment_for(small_model, text_file, tmp_path / "r", **changes)))
    with pytest.raises(UserError) as error:
        run_experiment(load_experiment(config))
    assert str(error.value).startswith(f"{config}: {message.format(text=text_file)}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


def test_overwriting_needs_an_experiment_of_the_same_title(finished):
    out, experiment, _ = finished
    before = (out / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="a run of another experiment"):
        run_experiment(experiment.model_copy(update={"title": "another"}), overwrite=True)
    assert (out / "rows.jsonl").read_bytes() == before


def test_a_note_that_holds_for_every_candidate_is_shown_once(small_model, text_file, tmp_path, capsys):
    experiment = experiment_for(
        small_model,
        text_file,
        tmp_path / "r",
        quantization={"method": "gptq", "group_size": 64, "propagate": False},
        allocation={},
        baselines={"uniform": [4, 2], "finer_groups": False},
        moves=None,
    )
    results = run_experiment(experiment, progress=Progress())
    assert len(results.rows) == 3
    assert results.quantizer["propagate"] is False
    assert capsys.readouterr().err.count("gptq: every block is calibrated on the original's states") == 1


class Killed(BaseException):
    """What no one catches."""


@pytest.fixture(scope="module")
def calibrated(small_model, text_file, tmp_path_factory):
    """A run of a calibrated quantizer that writes every model block by block, as it does with large ones."""
    changes = {"quantization": {"method": "gptq", "group_size": 64}, "moves": None}
    changes |= {"allocation": {"bits": [2, 4], "budgets": [3.0], "orders": ["lim"]}}
    changes |= {"baselines": {"uniform": [3], "finer_groups": False}}
    out = tmp_path_factory.mktemp("calibrated") / "r"
    experiment = experiment_for(small_model, text_file, out, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lq.runs.experiment.CACHE_LIMIT", 0)
        run_experiment(experiment)
    return experiment, contents(out)


def test_a_large_model_is_written_while_it_is_measured_and_is_the_same(calibrated, small_model, text_file, tmp_path):
    experiment, written = calibrated
    assert not any(name.startswith("unfinished") for name in written)
    kept = experiment.model_copy(update={"output": str(tmp_path / "r")})
    run_experiment(kept)
    expected = {name: data for name, data in written.items() if name not in ("run.json", "config.yaml")}
    assert {name: data for name, data in contents(tmp_path / "r").items() if name in expected} == expected


@pytest.mark.parametrize("moment", ["block_1.safetensors", "lq.json", "rows.jsonl"])
def test_a_large_model_goes_on_at_the_block_where_it_was(calibrated, tmp_path, monkeypatch, moment):
    experiment, written = calibrated
    experiment = experiment.model_copy(update={"output": str(tmp_path / "r")})
    monkeypatch.setattr("lq.runs.experiment.CACHE_LIMIT", 0)

    def killed_before(function):
        def write(path, *args):
            if path.name == moment and (moment != "rows.jsonl" or (path.parent / "unfinished").exists()):
                raise Killed
            return function(path, *args)

        return write

    with monkeypatch.context() as patch:
        patch.setattr("lq.checkpoint.write.write_tensors", killed_before(writing.write_tensors))
        patch.setattr("lq.checkpoint.write.write_text", killed_before(writing.write_text))
        patch.setattr("lq.runs.journal._append", killed_before(journal_module._append))
        with pytest.raises(Killed):
            run_experiment(experiment)
    (unfinished,) = (tmp_path / "r" / "unfinished").iterdir()
    assert (unfinished / "block_0.safetensors").exists()
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr("lq.checkpoint.write.to_tensors", lambda params: parts.append(1) or to_tensors(params))
        run_experiment(experiment, resume=True)
    whole = 5  # embedding, three blocks, head
    assert len(parts) == {"block_1.safetensors": whole - 2, "lq.json": 0, "rows.jsonl": 0}[moment] + whole
    found = contents(tmp_path / "r")
    assert found.keys() == written.keys()
    assert all(found[name] == data for name, data in written.items() if name not in ("run.json", "config.yaml"))


def test_a_bit_that_changed_is_found_and_what_it_was_in_is_made_again(
    finished, small_model, text_file, tmp_path, capsys
):
    """In every file of a run that is read again, at its end and in its middle."""
    whole = contents(finished[0])
    read_again = ["scores/lim.json", "plans/lim_@_3.json", "rows.jsonl"]
    for name in read_again:
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(finished[0], out)
        experiment = experiment_for(small_model, text_file, out)
        data = bytearray(whole[name])
        digit = next(i for i in range(len(data) // 2, len(data)) if chr(data[i]) in "0246")
        data[digit] ^= 1
        (out / name).write_bytes(data)
        run_experiment(experiment, resume=True, progress=Progress())
        said = capsys.readouterr().err
        assert name in said
        assert "checksum does not match" in said or "1 damaged line left out" in said
        found = contents(out)
        assert all(found[n] == d for n, d in whole.items() if n not in ("run.json", "config.yaml"))
    data = bytearray(whole["run.json"])
    data[data.index(b'"seconds"') + 12] ^= 1
    (out / "run.json").write_bytes(data)
    with pytest.raises(UserError, match=r"run\.json: damaged; remove"):
        run_experiment(experiment, resume=True)
    data = bytearray(whole["results.json"])
    data[data.index(b'"perplexity"') + 15] ^= 1
    (out / "results.json").write_bytes(data)
    with pytest.raises(UserError, match="checksum does not match"):
        Results.read(out / "results.json")


def test_two_runs_cannot_share_a_directory(small_model, text_file, tmp_path):
    experiment = experiment_for(small_model, text_file, tmp_path / "r")
    with (
        held(tmp_path / "r"),
        pytest.raises(UserError, match=rf"r: process {os.getpid()} on .* writes to it; wait for"),
    ):
        run_experiment(experiment)
    assert not (tmp_path / "r").exists()
