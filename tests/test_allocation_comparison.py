"""The shipped comparison of allocations: its config is valid, and it measures a small one at equal bytes."""

import json
from pathlib import Path

import pytest
import yaml
from scipy.stats import spearmanr

from experiments.allocation.compare import NO_OPTIONS, Bench, Measured, main, plans, read
from experiments.allocation.tables import agreements, draw, draw_damage, lines, page, ratios, table
from experiments.rows import append, rows_of
from lq.allocation import ALLOCATORS
from lq.errors import UserError
from lq.importance import METRICS, Scores
from lq.search import SEARCHES

pytestmark = pytest.mark.once

CONFIG = Path(__file__).parent.parent / "experiments" / "allocation" / "standin.yaml"


def test_the_shipped_comparison_has_every_score_and_allocator():
    comparison = read(CONFIG)
    assert {score.metric for score in comparison.scores} == set(METRICS)
    assert {plan.allocator for plan in comparison.plans} == set(ALLOCATORS)
    assert {plan.search for plan in comparison.plans} == {None, *SEARCHES}
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
    for row in rows.values():
        # What is not counted in bits per weight is the same in all: embedding, head and norms.
        other, shapes = rows["rtn, kl, 3.4 bpw"], bench.plan(*of(comparison, row))[0].shapes
        weights = [shape[-2] * shape[-1] for path, shape in shapes.items() if path.startswith("block_")]
        counted = (row.bpw - other.bpw) * sum(weights) / 8
        # Offsets in the header have more digits or fewer; a matrix in segments has an entry more, for its order.
        entries = 150 * len(weights) if row.plan in ("segments", "descent") else 0
        assert -64 <= row.bytes_on_disk - other.bytes_on_disk - counted <= 64 + entries
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
    (row,) = [line for line in agreements(tmp_path / "scores", "rtn").splitlines() if "predicted_kl" in line]
    both = [Scores.read(tmp_path / "scores" / f"rtn_{name}.json").values for name in ("kl", "predicted_kl_0")]
    rho = spearmanr(list(both[0].values()), list(both[1].values())).statistic
    assert row.startswith(f"| matrix | predicted_kl_0 | {rho:.2f} | ")
    for name in ("pareto.png", "damage.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def of(comparison, row):
    """What `Bench.plan` takes of a row."""
    return next((q, p, b, s) for name, q, p, b, s in plans(comparison) if name == row.name)


def test_where_nothing_was_possible_it_fails(small, tmp_path, capsys):
    given = yaml.safe_load(small.read_text(encoding="utf-8")) | {"budgets": [17], "output": str(tmp_path / "out")}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "x.yaml"), "--only", "^rtn, random"])
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.count("not possible: budget: 17 bits per weight cannot be met") == 2
    assert printed.err == f"compare: {tmp_path / 'out'}: none of 2 rows was possible; the reasons are above\n"


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


TINY = {
    "title": "t",
    "model": "nowhere",
    "output": "o",
    "calibration": {},
    "evaluation": {},
    "quantizers": [{"name": "rtn"}],
    "bits": [2, 4],
    "budgets": [3.0],
    "scores": [{"name": "lim", "metric": "lim"}],
    "plans": [{"name": "lim", "score": "lim"}],
}
LIM, RTN = TINY["scores"][0], TINY["quantizers"][0]
PLAN = TINY["plans"][0]


def message_of(tmp_path, text):
    """The one line that a config is refused with, without the directory."""
    (tmp_path / "t.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read(tmp_path / "t.yaml")
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"plans": [PLAN, PLAN]}, "two plans named lim; rename one"),
        ({"scores": [LIM, LIM]}, "two scores named lim; rename one"),
        ({"quantizers": [RTN, RTN]}, "two quantizers named rtn; rename one"),
        ({"budgets": [3, 2.5, 3.0]}, "budgets: 3.0 is listed twice; leave one out"),
        ({"budgets": [float("inf")]}, "budgets.0: Input should be a finite number (got inf)"),
        (
            {"plans": [PLAN, {"name": "b", "score": "l.m"}, {"name": "c", "score": "l m"}],
             "scores": [LIM, {"name": "l.m", "metric": "lim"}, {"name": "l m", "metric": "lim"}]},
            "scores: l.m and l m would both be l_m.json; rename one",
        ),
        (
            {"plans": [PLAN, {"name": "b", "score": "rtn lim"}],
             "scores": [{"name": "lim", "metric": "kl"}, {"name": "rtn lim", "metric": "zd"}]},
            "scores: lim by rtn and rtn lim would both be rtn_lim.json; rename one",
        ),
        (
            {"quantizers": [{"name": "a, b"}, {"name": "a"}], "plans": [PLAN | {"name": "c"}, PLAN | {"name": "b, c"}]},
            "two rows named a, b, c, 3.0 bpw; rename a plan or a quantizer",
        ),
        ({"scores": [LIM | {"metric": "lmi"}]}, "scores.0.metric: unknown metric 'lmi'; known: lim, "),
        ({"scores": [LIM | {"options": {"skp": 1}}]}, "score lim, quantizer rtn: metric lim: unknown option 'skp'"),
        ({"scores": [{"name": "lim", "metric": "kl", "options": {"bits": [9]}}]}, "score lim, quantizer rtn: bits: 9"),
        ({"plans": [PLAN | {"allocator": "greed"}]}, "plans.0.allocator: unknown allocator 'greed'; known: rank, "),
        ({"plans": [PLAN | {"options": {"sed": 1}}]}, "plans.0: allocator knapsack: unknown option 'sed'"),
        ({"plans": [PLAN | {"search": "amp"}]}, "plans.0.search: unknown search 'amp'; known: evolution, amq, "),
        (
            {"plans": [PLAN | {"search": "amq", "search_options": {"sed": 1}}]},
            "plans.0: search amq: unknown option 'sed'",
        ),
        ({"plans": [PLAN | {"search_options": {"seed": 1}}]}, "plans.0: search_options are given, but no search; name"),
        ({"plans": [PLAN | {"costs": "size"}]}, "plans.0.costs: Input should be 'measured', 'place' or 'value'"),
        ({"plans": [PLAN | {"budgets": [2.5]}]}, "plan lim: budgets: 2.5 is none of the config's; write some of [3.0]"),
        ({"plans": [PLAN | {"score": "zd"}]}, "plan lim: zd is none of the scores; write one of lim"),
        ({"bits": [2, 9]}, "bits.1: Input should be less than or equal to 8 (got 9)"),
        ({"bit": [2]}, "bit: unknown key"),
        ({"base": "t.yaml"}, "base: t.yaml is this config itself; name another, or leave it out"),
        ({"base": "."}, "base: .: a directory; give a YAML file"),
        ({"base": "none.yaml"}, "base: none.yaml: no such config; see experiments/allocation/standin.yaml"),
        ({"base": 3}, "base: 3 is no file; write the name of a config, or leave it out"),
        ({"base": "list.yaml"}, "base: list.yaml: expected keys such as model: and output:, found list"),
        ({"base": "based.yaml"}, "base: based.yaml has a base itself, x.yaml; name a config that has none"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, change, line):
    (tmp_path / "list.yaml").write_text("[1]", encoding="utf-8")
    (tmp_path / "based.yaml").write_text("base: x.yaml", encoding="utf-8")
    message = message_of(tmp_path, yaml.safe_dump(TINY | change)).replace(str(tmp_path), ".")
    assert message.startswith(f"t.yaml: {line}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "t.yaml: expected keys such as model: and output:, found NoneType"),
        ("[1]", "t.yaml: expected keys such as model: and output:, found list"),
        ("a: [", "t.yaml:1: not valid YAML"),
        ("a: 2020-13-45", "t.yaml: not valid YAML (month must be in 1..12"),
        ("title: a\ntitle: b", "t.yaml:2: the key title is given twice; keep one"),
    ],
)
def test_what_is_no_config(tmp_path, text, line):
    assert message_of(tmp_path, text).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "("], "--only (: not a regular expression (missing ), unterminated subpattern"),
        (["--only", "gptq"], "--only gptq: found in none of 1 rows; write part of a name such as rtn, lim, 3.0 bpw"),
        ([], "nowhere"),
        (["--out", "t.yaml"], "--out t.yaml: a file; give a directory"),
    ],
)
def test_a_command_that_cannot_be_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main(["t.yaml", *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith(f"compare: {line}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.yaml"]


MEASURED = sorted(path.parent.name for path in (CONFIG.parent / "measured").glob("*/rows.jsonl"))


@pytest.mark.parametrize("name", MEASURED)
def test_measured_rows_are_of_the_shipped_configs(name):
    """So that whoever has them can go on: names and options are those of the config, and no row is of another."""
    comparison = read(CONFIG.parent / f"{name}.yaml")
    measured = CONFIG.parent / "measured" / name
    identity = json.loads((measured / "identity.json").read_text(encoding="utf-8"))
    assert identity["bits"] == comparison.bits
    for kind in ("quantizers", "scores", "plans"):
        options = {section.name: section.model_dump(exclude=NO_OPTIONS) for section in getattr(comparison, kind)}
        known = {name: given for name, given in identity[kind].items() if name in options}
        assert known == {name: options[name] for name in known}
    found = [row.name for row in rows_of(measured / "rows.jsonl", Measured)]
    assert len(found) == len(set(found))
    assert set(found) <= {name for name, *_ in plans(comparison)}
    assert {row.plan for row in rows_of(measured / "rows.jsonl", Measured)} <= set(identity["plans"])


@pytest.mark.parametrize("name", MEASURED)
def test_measured_tables_are_those_of_the_rows(name):
    measured = CONFIG.parent / "measured" / name
    written = (measured / "tables.md").read_text(encoding="utf-8")
    assert written == page(lines(rows_of(measured / "rows.jsonl", Measured)), measured / "scores") + "\n"


def test_the_readme_has_the_table_of_the_rows():
    found = lines(rows_of(CONFIG.parent / "measured" / "standin" / "rows.jsonl", Measured))
    assert ratios(found, "gptq") in (CONFIG.parent / "README.md").read_text(encoding="utf-8")
