"""The shipped comparison of allocations: its config is valid, and it measures a small one at equal bytes."""

import json
from pathlib import Path

import pytest
import yaml

from experiments.allocation.compare import Bench, Measured, plans, read
from experiments.allocation.tables import draw, draw_damage, lines, ratios, table
from experiments.rows import append, rows_of
from lq.allocation import ALLOCATORS
from lq.errors import UserError
from lq.importance import METRICS
from lq.search import SEARCHES

pytestmark = pytest.mark.once

CONFIG = Path(__file__).parent.parent / "experiments" / "allocation" / "standin.yaml"


def test_the_shipped_comparison_has_every_score_and_allocator():
    comparison = read(CONFIG)
    assert {score.metric for score in comparison.scores} == set(METRICS)
    assert {plan.allocator for plan in comparison.plans} == set(ALLOCATORS)
    assert {plan.search for plan in comparison.plans} <= {None, *SEARCHES}
    assert {plan.score for plan in comparison.plans} == {score.name for score in comparison.scores}
    names = [name for name, *_ in plans(comparison)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", sorted(CONFIG.parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_here_is_a_comparison(path):
    comparison = read(path)
    assert len({name for name, *_ in plans(comparison)}) == len(list(plans(comparison)))
    for name in ("Claims", "Deviates", "Costs", "Expects", "Measured"):
        assert f"# {name} " in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small(small_model, text_file, tmp_path_factory):
    """A config of a few plans on a small model, as a file."""
    given = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    given |= {"model": str(small_model.path), "bits": [2, 3, 4], "budgets": [3.4]}
    given["calibration"] = {"data": str(text_file), "samples": 4, "length": 32, "batch_size": 2}
    given["evaluation"] = {"data": str(text_file), "window": 32, "windows": 4, "batch_size": 2}
    for quantizer in given["quantizers"]:
        quantizer["group_size"] = 32
    segments = {"name": "segments", "metric": "predicted_kl", "options": {"unit": "segment", "segment_channels": 32}}
    given["scores"] = [segments, *({"name": name, "metric": name} for name in ("random", "kl", "predicted_kl"))]
    given["plans"] = [
        {"name": "random", "score": "random", "allocator": "rank", "bits": [2, 4], "seeds": 2, "quantizers": ["rtn"]},
        {"name": "kl", "score": "kl", "quantizers": ["rtn"]},
        {"name": "segments", "score": "segments"},
        {
            "name": "evopress",
            "score": "random",
            "costs": "place",
            "search": "evolution",
            "search_options": {"generations": 2, "offspring": 2, "survivors": [1], "windows": [1]},
            "quantizers": ["rtn"],
        },
        {
            "name": "descent",
            "score": "random",
            "costs": "place",
            "search": "descent",
            "search_options": {"generations": 1, "segment_channels": 32, "draws": 1},
            "quantizers": ["rtn"],
        },
    ]
    path = tmp_path_factory.mktemp("comparison") / "small.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def test_plans_are_measured_at_equal_bytes(small, tmp_path):
    comparison = read(small)
    bench, file = Bench(comparison, tmp_path), tmp_path / "rows.jsonl"
    bench.claim()
    for name, *what in plans(comparison):
        append(file, bench.measure(name, *what))
    rows = {row.name: row for row in rows_of(file, Measured)}
    assert set(rows) == {
        "gptq, segments, 3.4 bpw",
        "rtn, random, 3.4 bpw, seed 0",
        "rtn, random, 3.4 bpw, seed 1",
        "rtn, kl, 3.4 bpw",
        "rtn, segments, 3.4 bpw",
        "rtn, evopress, 3.4 bpw",
        "rtn, descent, 3.4 bpw",
    }
    assert all(3.0 < row.bpw <= 3.4 for row in rows.values())
    headers = 0.02 * max(row.bytes_on_disk for row in rows.values())
    for row in rows.values():
        # What is not counted in bits per weight is the same in all: embedding, head and norms.
        other = rows["rtn, kl, 3.4 bpw"]
        weights = sum(shape[-2] * shape[-1] for path, shape in bench.plan(*of(comparison, row))[0].shapes.items()
                      if path.startswith("block_"))  # fmt: skip
        counted = (row.bpw - other.bpw) * weights / 8
        assert row.bytes_on_disk - other.bytes_on_disk == pytest.approx(counted, abs=headers)
    assert rows["rtn, random, 3.4 bpw, seed 0"].passes is None
    assert rows["rtn, evopress, 3.4 bpw"].passes > 0
    assert rows["rtn, descent, 3.4 bpw"].passes >= 4 + 2 + 3 + 1
    made = sorted(path.name for path in (tmp_path / "scores").glob("*.json") if "seconds" not in path.name)
    assert made == ["gptq_segments_0.json", "random_0.json", "random_1.json", "rtn_kl.json", "rtn_segments_0.json"]  # fmt: skip  # noqa: E501
    before = (tmp_path / "scores" / "rtn_kl.json").stat().st_mtime_ns
    assert bench.scores(comparison.of("quantizers", "rtn"), comparison.of("scores", "kl"), 0)[0].metric == "kl"
    assert (tmp_path / "scores" / "rtn_kl.json").stat().st_mtime_ns == before, "scores are made once"
    assert not list(tmp_path.glob(".written-*"))
    found = lines(list(rows.values()))
    assert "| kl | 1.00 |" in ratios(found, "rtn")
    assert f"| random | {rows['rtn, random, 3.4 bpw, seed 0'].bpw:.4f} |" in table(found, "rtn", 3.4)
    draw(found, tmp_path / "pareto.png")
    draw_damage(tmp_path / "scores", "rtn", tmp_path / "none.png")
    bench.scores(comparison.of("quantizers", "rtn"), comparison.of("scores", "predicted_kl"), 0)
    draw_damage(tmp_path / "scores", "rtn", tmp_path / "damage.png")
    assert not (tmp_path / "none.png").exists(), "no other score of matrices"
    for name in ("pareto.png", "damage.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def of(comparison, row):
    """What `Bench.plan` takes of a row."""
    return next((q, p, b, s) for name, q, p, b, s in plans(comparison) if name == row.name)


def test_names_that_are_nowhere(small, tmp_path):
    given = yaml.safe_load(small.read_text(encoding="utf-8"))
    given["plans"][0]["score"] = "lim"
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(UserError, match="lim is none of the scores; write one of segments, random, kl, predicted_kl"):
        read(tmp_path / "x.yaml")
    given["plans"][0] |= {"score": "random", "quantizers": ["awq"]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(UserError, match="awq is none of the quantizers"):
        read(tmp_path / "x.yaml")


def test_a_config_may_be_another_but_for_what_it_says(small, tmp_path):
    given = yaml.safe_load(small.read_text(encoding="utf-8"))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    (tmp_path / "y.yaml").write_text("base: x.yaml\nmodel: other\n", encoding="utf-8")
    assert read(tmp_path / "y.yaml") == read(tmp_path / "x.yaml").model_copy(update={"model": "other"})
    (tmp_path / "z.yaml").write_text("base: nowhere.yaml\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"nowhere.yaml: no such config"):
        read(tmp_path / "z.yaml")


MEASURED = sorted(path.parent.name for path in (CONFIG.parent / "measured").glob("*/rows.jsonl"))


@pytest.mark.parametrize("name", MEASURED)
def test_measured_rows_are_of_the_shipped_configs(name):
    """So that whoever has them can go on: names and options are those of the config, and no row is of another."""
    comparison = read(CONFIG.parent / f"{name}.yaml")
    measured = CONFIG.parent / "measured" / name
    identity = json.loads((measured / "identity.json").read_text(encoding="utf-8"))
    assert identity["bits"] == comparison.bits
    for kind in ("quantizers", "scores", "plans"):
        options = {section.name: section.model_dump(exclude={"name"}) for section in getattr(comparison, kind)}
        known = {name: given for name, given in identity[kind].items() if name in options}
        assert known == {name: options[name] for name in known}
    found = [row.name for row in rows_of(measured / "rows.jsonl", Measured)]
    assert len(found) == len(set(found))
    assert set(found) <= {name for name, *_ in plans(comparison)}
    assert {row.plan for row in rows_of(measured / "rows.jsonl", Measured)} <= set(identity["plans"])
