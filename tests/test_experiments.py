"""The shipped comparison of quantizers: its config is valid, and it measures and tabulates a small one."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from experiments.mistakes import in_one_line
from experiments.quantizers.compare import Bench, Measured, models, read
from experiments.quantizers.tables import draw, lines, noise, ratios, table
from experiments.rows import append, rows_of
from lq.errors import UserError
from lq.quantizers import QUANTIZERS

pytestmark = pytest.mark.once

CONFIG = Path(__file__).parent.parent / "experiments" / "quantizers" / "standin.yaml"


def test_the_shipped_comparison_has_every_quantizer():
    comparison = read(CONFIG)
    assert {method.method for method in comparison.methods} == set(QUANTIZERS)
    for method in comparison.methods:
        for group_size in comparison.group_sizes:
            for before in ([], [comparison.rotation]) if method.rotated else ([],):
                assert method.quantization(group_size, before).pipeline.recipe.method == method.method
    names = [name for name, *_ in models(comparison, [])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", sorted(CONFIG.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_here_is_a_comparison(path):
    assert len(list(models(read(path), []))) > 0
    assert path.read_text(encoding="utf-8").startswith("#"), "a config says in its header what it claims and costs"


def test_the_replication_of_baq_can_be_read():
    comparison = read(CONFIG.parent / "baq_opt_125m.yaml")
    assert len(list(models(comparison, []))) == 2 * 3 * 4


def test_the_committed_rows_are_of_the_shipped_comparison():
    """So that they can be gone on with, and the tables are of what the config says."""
    comparison, measured = read(CONFIG), CONFIG.parent / "measured"
    identity = json.loads((measured / "identity.json").read_text())
    methods = {method.name: method.model_dump(exclude={"name", "rotated"}) for method in comparison.methods}
    assert identity["methods"] == methods
    assert identity["rotation"] == comparison.rotation
    names = [row.name for row in rows_of(measured / "rows.jsonl", Measured)]
    assert len(names) == len(set(names))
    assert {name for name, *_ in models(comparison, [])} >= set(names)


def test_rows_are_measured_kept_and_tabulated(small_model, text_file, tmp_path):
    given = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    given |= {"model": str(small_model.path), "bits": [3], "group_sizes": [64], "seeds": [0, 1]}
    given["calibration"] = {"data": str(text_file), "samples": 4, "length": 32, "batch_size": 2}
    given["evaluation"] = {"data": str(text_file), "window": 32, "windows": 4, "batch_size": 2}
    given["methods"] = [m for m in given["methods"] if m["name"] in ("rtn absmax", "gptq")]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    comparison = read(tmp_path / "small.yaml")
    bench, file = Bench(comparison), tmp_path / "rows.jsonl"
    for name, *what in models(comparison, []):
        append(file, bench.measure(name, *what))
    with file.open("a") as f:
        f.write('{"name": "cut sh')  # by a crash
    append(file, dataclasses.replace(rows_of(file, Measured)[0], name="one more"))
    *rows, last = rows_of(file, Measured)
    assert last.name == "one more", "what was cut short takes nothing with it"
    assert [row.name for row in rows] == [name for name, *_ in models(comparison, [])]
    assert len(rows) == 1 + 3 * 2, "absmax once, and rotated, gptq and gptq rotated with two seeds"
    assert all(row.bpw == pytest.approx(3.25 if row.method == "rtn absmax" else 3.296875) for row in rows)
    assert json.loads(file.read_text().splitlines()[0]) == dataclasses.asdict(rows[0])
    text = table(lines(rows), 3, 64, original=rows[0].perplexity / 2)
    assert "| rtn absmax | 3.2500 |" in text
    assert "gptq, rotated" in text
    assert "| gptq | 1.00 (2) |" in ratios(lines(rows))
    assert "| gptq, rotated | 2 " in noise(lines(rows))
    draw(lines(rows), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_rows_of_something_else_are_not_gone_on_with(small_model, text_file, tmp_path):
    given = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    given["model"] = str(small_model.path)
    given["calibration"] = {"data": str(text_file), "samples": 4, "length": 32, "batch_size": 2}
    given["evaluation"] = {"data": str(text_file), "window": 32, "windows": 4, "batch_size": 2}
    methods = {method["name"]: method for method in given["methods"]}
    given["methods"] = [methods["gptq"]]
    out = tmp_path / "rows"
    out.mkdir()

    def begin(**changes):
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(given | changes), encoding="utf-8")
        Bench(read(tmp_path / "small.yaml")).claim(out)

    begin()
    begin(methods=[methods["awq"]], bits=[2])
    assert set(json.loads((out / "identity.json").read_text())["methods"]) == {"gptq", "awq"}
    begin(methods=[methods["gptq"]])
    with pytest.raises(UserError, match="rows of gptq with other options"):
        begin(methods=[{**methods["gptq"], "options": {"damping": 0.1}}])
    with pytest.raises(UserError, match="rows of another calibration"):
        begin(calibration={**given["calibration"], "samples": 5})
    with pytest.raises(UserError, match="rows of another evaluation"):
        begin(evaluation={**given["evaluation"], "windows": 3})
    whole = (out / "identity.json").read_bytes()
    for damaged in (b"", b"[]", b"\xff", b'{"methods": 3}'):
        (out / "identity.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"identity\.json: damaged|rows of another"):
            begin()
        assert (out / "identity.json").read_bytes() == damaged
    (out / "identity.json").write_bytes(whole)
    for damaged in (b"{", b"3"):
        (out / "environments.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"environments\.json: damaged"):
            begin(methods=[methods["autoround"]])
        assert (out / "identity.json").read_bytes() == whole
    (out / "environments.json").unlink()
    (out / "identity.json").unlink()
    (out / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match=r"rows without identity\.json"):
        begin()


def test_a_broken_config_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("title: x\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.yaml: .*model Field required"):
        read(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (UserError("bits: 9\n  write 1 to 8"), "compare: bits: 9 write 1 to 8\n"),
        (NotADirectoryError(20, "Not a directory", "a/b"), "compare: a/b: Not a directory\n"),
    ],
)
def test_mistakes_end_a_program_in_one_line(capsys, mistake, line):
    with pytest.raises(SystemExit) as exit, in_one_line("compare"):
        raise mistake
    assert exit.value.code == 2
    assert capsys.readouterr().err == line
