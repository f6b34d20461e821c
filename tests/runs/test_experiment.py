"""A small experiment from end to end, interrupted, resumed, and refused where it does not belong."""

import csv
import json

import pytest

from lq.errors import UserError
from lq.runs.config import Experiment
from lq.runs.experiment import run_experiment
from lq.runs.results import Results


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
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "model": "other"}))
    try:
        with pytest.raises(UserError, match="a run of another model"):
            run_experiment(finished[1], resume=True)
    finally:
        (out / "run.json").write_text(json.dumps(record))


def test_a_foreign_directory_is_refused(small_model, text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty, and no run of lq"):
        run_experiment(experiment_for(small_model, text_file, tmp_path))


def test_a_killed_run_resumes_to_the_same_numbers(finished, small_model, text_file, tmp_path):
    out, _, results = finished
    experiment = experiment_for(small_model, text_file, tmp_path / "r")
    (tmp_path / "r").mkdir()
    for name in ("run.json", "config.yaml"):
        (tmp_path / "r" / name).write_bytes((out / name).read_bytes())
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r" / "rows.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed while writing a line
    resumed = run_experiment(experiment, resume=True)
    assert [row.name for row in resumed.rows] == [row.name for row in results.rows]
    assert [row.perplexity for row in resumed.rows] == [row.perplexity for row in results.rows]
    assert [row.seconds for row in resumed.rows[:5]] == [row.seconds for row in results.rows[:5]]


def test_an_impossible_budget_stops_before_anything_is_evaluated(small_model, text_file, tmp_path):
    experiment = experiment_for(
        small_model, text_file, tmp_path / "r", allocation={"bits": [2, 4], "budgets": [0.5], "orders": ["zd"]}
    )
    with pytest.raises(UserError, match=r"budget: 0.5 bits per weight cannot be met"):
        run_experiment(experiment)
    assert not (tmp_path / "r").exists()


def test_overwriting_needs_an_experiment_of_the_same_title(finished):
    out, experiment, _ = finished
    before = (out / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match="a run of another experiment"):
        run_experiment(experiment.model_copy(update={"title": "another"}), overwrite=True)
    assert (out / "rows.jsonl").read_bytes() == before
