"""The command: what it prints, what it exits with, and that nothing is left behind by a mistake."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
from small_models import llama_config, random_params, write_directory
from typer.testing import CliRunner

from lq import assets
from lq.allocation import Plan
from lq.cli import app, main
from lq.quantizers import QUANTIZERS


def lq(*args):
    """Exit status, standard output and standard error of a command, run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*args):
    """The one line a mistake is answered with."""
    status, _, error = lq(*args)
    assert status == 2, error
    assert error.startswith("lq: ")
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def scores(small_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    status, printed, _ = lq(
        "score", small_model.path, "--metric", "lim", "--metric", "zd", "--out", out, "--calibration", text_file,
        "--samples", 4, "--length", 32, "--quiet",
    )  # fmt: skip
    assert status == 0
    assert "block_2" in printed
    return out


@pytest.fixture(scope="module")
def plan(scores, tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    budget = ("--bpw", 3.2, "--bits", "2,3,4", "--group-size", 64)
    picture = out.with_suffix(".png")
    status, printed, _ = lq("allocate", scores / "lim.json", *budget, "--out", out, "--picture", picture)
    assert status == 0
    assert "bits per weight" in printed
    assert "code bits" in printed
    assert f"wrote {picture}" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"
    return out


@pytest.fixture(scope="module")
def quantized(small_model, plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "q"
    status, printed, _ = lq("quantize", small_model.path, "--plan", plan, "--out", out, "--quiet")
    assert status == 0
    assert "of them headers" in printed
    return out


def test_scores_are_files_and_a_picture(scores):
    assert {f.name for f in scores.iterdir()} == {"lim.json", "zd.json", "scores.png"}
    assert (scores / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_eval_from_another_process(small_model, quantized, text_file, tmp_path):
    command = [
        sys.executable, "-m", "lq", "eval", quantized, "--original", small_model.path, "--data", text_file,
        "--window", "32", "--windows", "4", "--json", tmp_path / "eval.json",
    ]  # fmt: skip
    out = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout
    facts = json.loads((tmp_path / "eval.json").read_text())
    for key in ("bits per weight", "code bits", "bytes on disk", "bytes on device", "perplexity", "protocol", "device"):
        assert key in out
    assert facts["bits per weight"] <= 3.2
    assert facts["tokens scored"] == 4 * 31
    assert facts["KL to the original, nats per token"] > 0
    assert 0 <= facts["top-1 agreement"] <= 1


def test_generate_continues_each_prompt(quantized):
    status, printed, _ = lq("generate", quantized, "--prompt", "def main(", "--prompt", "import", "--max-new-tokens", 5)
    assert status == 0
    assert printed.startswith("def main(")
    assert "\nimport" in printed


def test_generate_says_what_a_quantized_cache_takes(quantized):
    """Three blocks of two key/value heads of 16 channels, 64 slots: all of it still in the residual."""
    status, printed, error = lq("generate", quantized, "--prompt", "import", "--max-new-tokens", 5, "--kv-bits", 4)
    assert (status, printed) == lq("generate", quantized, "--prompt", "import", "--max-new-tokens", 5)[:2]
    size = 2 * 3 * 2 * 16 * 64 * 4
    assert f"key/value cache: {size} bytes at 4 bits; {size} as computed" in error
    assert "nothing was quantized: the newest 128 tokens stay as computed, and there were no more" in error


def test_quantize_can_score_and_allocate_itself(small_model, text_file, tmp_path):
    status, printed, _ = lq(
        "quantize", small_model.path, "--bpw", 2.85, "--metric", "lim", "--calibration", text_file, "--group-size", 64,
        "--out", tmp_path / "q", "--quiet",
    )  # fmt: skip
    assert status == 0
    assert float(printed.split()[0]) <= 2.85


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One block, one of whose matrices has two runs of 128 input channels."""
    config = dataclasses.replace(llama_config(1), intermediate_size=256)
    return write_directory(tmp_path_factory.mktemp("tiny") / "model", config, random_params(config))


@pytest.mark.parametrize("method", QUANTIZERS)
def test_every_quantizer_from_the_command_line(method, tiny, text_file, tmp_path):
    own = {"hqq": ("--zero-dtype", "bfloat16"), "baq": ("--mixed",)}.get(method, ())
    if QUANTIZERS[method].block:
        own += ("--option", "steps=2")
    reads = "calibration" in QUANTIZERS[method].needs
    text = ("--calibration", text_file, "--samples", 2, "--length", 32) if reads else ()
    out = tmp_path / "q"
    status, printed, error = lq(
        "quantize", tiny, "--bits", 3, "--group-size", 32, "--method", method, *own, *text, "--out", out
    )
    assert status == 0, error
    assert "bits per weight" in printed
    record = json.loads((out / "lq.json").read_text())["quantizer"]
    assert record["method"] == method
    assert re.search(rf"quantize \({method}\) 2/3, .* left, .*: block_0", error), "progress, block by block"
    assert (f"{method}: every block is calibrated on" in error) == reads
    assert record.get("propagate") == (None if not reads else method != "awq")


def test_calibration_can_be_asked_of_methods_that_need_none(tiny, text_file, tmp_path):
    """Channel scales and importance before plain rounding, on states of either kind."""
    given = ("--bits", 3, "--group-size", 32, "--calibration", text_file, "--samples", 2, "--length", 32)
    weighed = ("--option", "clip=opt", "--option", "importance=true")
    for number, (own, propagate) in enumerate(
        [(weighed, False), (("--transform", "awq"), False), (("--transform", "awq", "--propagate"), True)]
    ):
        out = tmp_path / str(number)
        status, _, error = lq("quantize", tiny, *given, *own, "--out", out)
        assert status == 0, error
        assert f"(propagate: {str(propagate).lower()})" in error
        assert json.loads((out / "lq.json").read_text())["quantizer"]["propagate"] is propagate
    plain = tmp_path / "plain"
    lq("quantize", tiny, "--bits", 3, "--group-size", 32, "--option", "clip=opt", "--out", plain)
    name = "block_0.safetensors"
    assert (plain / name).read_bytes() != (tmp_path / "0" / name).read_bytes(), "inputs have a say"


def test_an_interrupted_command_says_how_to_go_on_in_words_a_shell_reads(monkeypatch, tmp_path):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "resolve_model", interrupt)
    args = ["quantize", "my model", "--bits", "3", "--out", str(tmp_path / "q")]
    monkeypatch.setattr(sys, "argv", ["lq", *args])
    status, _, error = lq(*args)
    assert status == 130
    assert f"go on with: lq quantize 'my model' --bits 3 --out {tmp_path / 'q'} --resume" in error


def test_a_search_finds_a_plan_of_the_same_size(small_model, plan, text_file, tmp_path):
    text = ("--calibration", text_file, "--samples", 4, "--length", 32, "--batch-size", 2)
    options = [f"--option={given}" for given in ("generations=2", "offspring=3", "survivors=[1]", "windows=[4]")]
    status, printed, error = lq(
        "search", small_model.path, plan, *text, *options, "--out", tmp_path / "found.json"
    )  # fmt: skip
    assert status == 0, error
    found, given = Plan.read(tmp_path / "found.json"), Plan.read(plan)
    assert found.bpw <= given.bpw
    assert found.provenance["search"] == "evolution"
    passes = float(re.search(r"([\d.]+) forward passes of the text", printed)[1])
    assert 1 + 2 < passes <= 1 + 2 * 4, "the reference, and two generations of four, which begin alike"
    assert re.search(r"search \(evolution\) 2/2, 0:00 left, .*: KL 0\.\d{5}", error)


def test_a_measured_score_makes_a_plan(small_model, text_file, tmp_path):
    text = ("--calibration", text_file, "--samples", 2, "--length", 32)
    options = [f"--option={given}" for given in ("unit=part", "bits=[2, 4]", "group_size=64")]
    status, printed, error = lq("score", small_model.path, "--metric", "kl", *options, *text, "--out", tmp_path)
    assert status == 0, error
    assert "block_2/mlp" in printed
    budget = ("--bpw", 3.3, "--bits", "2,4", "--group-size", 64, "--method", "knapsack")
    status, _, error = lq("allocate", tmp_path / "kl.json", *budget, "--out", tmp_path / "plan.json")
    assert status == 0, error
    assert Plan.read(tmp_path / "plan.json").provenance["costs"] == "measured"


def test_scores_are_compared_over_parts_of_the_text(small_model, text_file, tmp_path):
    metrics = ["--metric", "lim", "--metric", "lim:aggregation=flat", "--metric", "zd"]
    text = ["--calibration", text_file, "--samples", 4, "--length", 16, "--parts", 2]
    status, printed, error = lq("score", small_model.path, *metrics, *text, "--out", tmp_path)
    assert status == 0, error
    assert {file.name for file in tmp_path.iterdir()} >= {"lim.json", "lim_aggregation=flat.json", "zd.json"}
    rows = re.findall(r"^(\S+) +(\S+) +-?[\d.]+ \(-?[\d.]+ to -?[\d.]+\)  [01] of 1 \([01] to [01]\)$", printed, re.M)
    assert rows == [("lim", "lim:aggregation=flat"), ("lim", "zd"), ("lim:aggregation=flat", "zd")]
    assert "over 2 parts of the text" in printed


def test_a_run_and_its_report(small_model, text_file, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text(
        f"model: {small_model.path}\noutput: {tmp_path / 'r'}\n"
        f"calibration: {{data: {text_file}, samples: 2, length: 32}}\n"
        f"evaluation: {{data: {text_file}, window: 32, windows: 2}}\n"
        "allocation: {budgets: [3.2], orders: [zd, {metric: random, seeds: 2}]}\n"
    )
    status, printed, _ = lq("run", config, "--set", "quantization.group_size=64", "--quiet")
    assert status == 0
    assert "This run compares with 2 random orders, and it takes 3 or more" in printed.splitlines()[-1]
    assert "already holds this run; add --resume" in refused("run", config, "--set", "quantization.group_size=64")
    status, printed, _ = lq("run", config, "--set", "quantization.group_size=64", "--resume", "--quiet")
    assert status == 0
    status, printed, _ = lq("report", tmp_path / "r", "--out", tmp_path / "report")
    assert status == 0
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize(
    "kind", ["importance", "allocators", "searches", "quantizers", "formats", "transforms", "models"]
)
def test_list(kind):
    status, printed, _ = lq("list", kind)
    assert status == 0
    assert printed


def test_version():
    status, printed, _ = lq("version")
    assert status == 0
    assert "jax" in printed
    assert "cpu, xla_scan, xla: the first that can, on cpu" in printed
    assert any(line.startswith("C++ on CPU") and line.split("CPU", 1)[1].strip() for line in printed.splitlines())


# Mistakes.


@pytest.fixture
def broken(small_model, tmp_path):
    shutil.copytree(small_model.path, tmp_path / "model")
    return tmp_path / "model"


def test_missing_model():
    assert "no such directory" in refused("eval", "/no/such/model")


def test_corrupt_header(broken):
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "model.safetensors: damaged or incomplete" in refused("eval", broken)


def test_truncated_weights(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors: damaged or incomplete" in refused("eval", broken)


def test_nan_weights(tmp_path, text_file):
    import jax

    config = llama_config(2)
    params = random_params(config)
    params = jax.tree.map(lambda leaf: leaf, params)
    kernel = params["block_1"]["mlp"]["up_proj"]["kernel"]
    params["block_1"]["mlp"]["up_proj"]["kernel"] = kernel.at[3, 4].set(float("nan"))
    path = write_directory(tmp_path / "nan", config, params)
    error = refused("eval", path, "--data", text_file, "--window", 32)
    assert "up_proj" in error
    assert "NaN" in error


def test_unknown_key(tmp_path):
    (tmp_path / "x.yaml").write_text("model: standin\noutput: o\nallocation: {budget: [3]}\n")
    assert "allocation.budget: unknown key" in refused("run", tmp_path / "x.yaml")


def test_impossible_budget(scores, tmp_path):
    out = tmp_path / "plan.json"
    assert "cannot be met; widths 2, 4" in refused("allocate", scores / "zd.json", "--bpw", 0.5, "--out", out)
    assert not out.exists()


def test_unknown_metric(small_model, tmp_path):
    error = refused("score", small_model.path, "--metric", "limm", "--out", tmp_path / "s")
    assert "did you mean lim?" in error
    assert not (tmp_path / "s").exists()


def test_missing_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    assert "no tokenizer" in refused("eval", broken)


def test_text_shorter_than_a_window(small_model, tmp_path):
    (tmp_path / "short.txt").write_text("def f(): pass")
    assert "fewer than one window of 128" in refused("eval", small_model.path, "--data", tmp_path / "short.txt")


def test_a_plan_of_another_model(plan, tmp_path):
    config = llama_config(3)
    other = write_directory(tmp_path / "other", config, random_params(config, seed=7))
    error = refused("quantize", other, "--plan", plan, "--out", tmp_path / "q")
    assert "a plan of another model" in error
    assert not (tmp_path / "q").exists()


def test_a_reference_that_does_not_fit(small_model, quantized, tmp_path, text_file):
    error = refused("eval", quantized, "--original", tmp_path, "--data", text_file, "--window", 32)
    assert "no config.json" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("allocate", "SCORES", "--bpw", "3", "--bits", "2;4"), "--bits 2;4: write widths like 2,3,4"),
        (("allocate", "SCORES", "--bpw", "3", "--pin", "x"), "--pin x: write REGEX=BITS"),
        (("allocate", "SCORES"), "budget: give bits per weight"),
        (("allocate", "SCORES", "--bpw", "3", "--pin", "x=²"), "--pin x=²: write REGEX=BITS"),
        (("allocate", "SCORES", "--bpw", "3", "--group-size", "7"), "--group-size 7: write 32, 64, 128, 256 or column"),
        (("allocate", "SCORES", "--bpw", "3", "--group-size", "²"), "--group-size ²: write 32"),
        (("allocate", "SCORES", "--bpw", "3", "--embedding-bits", "9"), "embedding_bits: 9; write 1 to 8"),
        (("allocate", "SCORES", "--bpw", "3", "--count", "most"), "--count most: write blocks or all"),
        (("allocate", "SCORES", "--bpw", "3", "--method", "greed"), "unknown allocator 'greed'"),
        (("allocate", "nowhere.json", "--bpw", "3"), "no such scores file"),
        (("allocate", "SCORES", "--bpw", "3", "--max-latency", "1"), "--latency and --max-latency go together"),
        (("allocate", "SCORES", "--bpw", "3", "--latency", "no.json", "--max-latency", "1"), "no such latency table"),
        (("allocate", "SCORES", "--bpw", "3", "--option", "a=1", "--option", "a=2"), "a is given twice; leave one out"),
        (("allocate", "SCORES", "--bpw", "3", "--option", "a=2020-13-45"), "2020-13-45 is not YAML"),
        (
            ("allocate", "SCORES", "--bpw", "3", "--latency", "x", "--max-latency", "1e300"),
            "seconds; write a number such",
        ),
        (
            ("allocate", "SCORES", "--bpw", "3", "--latency", "/", "--max-latency", "1"),
            "/: a directory; give a JSON file",
        ),
        (("score", "MODEL", "--metric", "zd", "--metric", "zd:", "--out", "s"), "--metric zd:: given twice"),
        (("allocate", "SCORES", "--bpw", "3", "--option", "sed=1"), "allocator rank: unknown option 'sed'"),
        (("score", "MODEL", "--metric", "zd", "--option", "sides=["), "--option sides=[: [ is not YAML"),
        (("score", "MODEL", "--metric", "lim", "--option", "batch_size=0"), "batch_size: 0; write 1 or more"),
        (("quantize", "MODEL", "--out", "q"), "budget: give bits per weight"),
        (("quantize", "MODEL", "--out", "q", "--bpw", "9"), "budget: 9 bits per weight cannot be met"),
        (("quantize", "MODEL", "--out", "q", "--plan", "p", "--bits", "3"), "--bits is given, but --plan decides"),
        (("quantize", "MODEL", "--out", "q", "--bits", "3", "--metric", "zd"), "--metric is given, but without --bpw"),
        (
            ("quantize", "MODEL", "--out", "q", "--bpw", "3", "--metric", "zd", "--samples", "3"),
            "neither rtn nor zd reads text",
        ),
        (("score", "MODEL", "--metric", "zd", "--calibration", "x"), "--calibration is given, but zd reads no text"),
        (("score", "MODEL", "--metric", "zd", "--out", "SCORES"), "a file; give a directory"),
        (("score", "MODEL", "--metric", "zd", "--metric", "zd", "--out", "s"), "--metric zd: given twice"),
        (
            ("score", "MODEL", "--metric", "zd", "--metric", "random", "--top", 9, "--out", "s"),
            "--top 9: zd scores 3 units",
        ),
        (("score", "MODEL", "--metric", "zd:side=two", "--out", "s"), "zd: unknown option 'side'"),
        (("score", "MODEL", "--metric", "lim", "--parts", 2, "--out", "s"), "--parts is given, but one score alone"),
        (("eval", "MODEL", "--json", "/"), "--json /: a directory; give a file"),
        (("search", "nowhere", "nowhere.json", "--out", "/"), "--out /: a directory; give a file"),
        (("search", "nowhere", "nowhere.json", "--out", "SCORES/x"), "zd.json is a file; give a place in a directory"),
        (("generate", "MODEL", "--prompt", "a", "--top-k", "3"), "--top-k is given, but at temperature 0 nothing is"),
        (("generate", "MODEL", "--prompt", "a", "--kv-bits", "5"), "kv_bits: 5; write 4 or 8, or 16 for a cache"),
        (("quantize", "MODEL", "--out", "q", "--plan", "p", "--method", "gtpq"), "did you mean gptq?"),
        (("quantize", "MODEL", "--out", "q", "--plan", "p", "--option", "clip=never"), "clip: 'never' is not one of"),
        (("quantize", "MODEL", "--out", "q", "--plan", "p", "--no-propagate"), "propagate: rtn reads no calibration"),
        (("report", "nowhere"), "no such file"),
        (("eval", "MODEL", "--dtype", "int8"), "--dtype int8: write float32"),
        (("generate", "MODEL", "--prompt", ""), "prompt"),
    ],
)
def test_other_mistakes(args, message, scores, small_model):
    places = {"SCORES": scores / "zd.json", "SCORES/x": scores / "zd.json" / "x", "MODEL": small_model.path}
    assert message in refused(*(places.get(a, a) for a in args))


def test_of_several_scores_none_is_written_when_one_cannot_be(small_model, tmp_path):
    options = ("--metric", "zd", "--metric", "first_last", "--option", "sides=two")
    assert "first_last: unknown option 'sides'" in refused("score", small_model.path, *options, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["quantize", "standin"], "lq: missing option '--out'; see lq quantize --help"),
        (["eval", "standin", "--window", "x"], "lq: invalid value for '--window': "),
        (["quant"], "lq: no such command 'quant'"),
        (["list", "colours"], "lq: invalid value for"),
    ],
)
def test_a_command_line_that_does_not_parse_is_one_line(args, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lq", *args])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_the_command_alone_prints_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lq"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code in (0, None)
    assert "quantize" in capsys.readouterr().out


def test_one_width_needs_no_budget(small_model, tmp_path):
    status, printed, _ = lq(
        "quantize", small_model.path, "--bits", 3, "--pin", "block_1=4", "--out", tmp_path / "q", "-q"
    )
    assert status == 0
    assert "bits per block: 3 4 3" in printed


def test_a_path_that_cannot_be_used_is_one_line(scores, tmp_path):
    assert "directory" in refused("allocate", scores / "zd.json", "--bpw", 3, "--group-size", 64, "--out", tmp_path)
    assert "directory" in refused("allocate", tmp_path, "--bpw", 3)


@pytest.mark.parametrize("verb", ["allocate", "quantize"])
def test_the_help_says_who_uses_interactions(verb):
    assert "only quadratic uses interactions" in " ".join(re.sub(r"[^\w\s]", " ", lq(verb, "--help")[1]).split())


@pytest.mark.parametrize(
    ("out", "picture", "message"),
    [
        ("a.json", "a.json", "--picture a.json: is the plan's file as well; give another"),
        ("a.json", "./a.json", "--picture a.json: is the plan's file as well; give another"),
        ("a.json", ".", "--picture .: a directory; give a file"),
        ("a.json", "f/a.png", "f is a file; give a place in a directory"),
        (".", "a.png", "--out .: a directory; give a file"),
        ("f/a.json", "a.png", "f is a file; give a place in a directory"),
    ],
)
def test_neither_plan_nor_picture_is_written_when_one_cannot_be(scores, tmp_path, monkeypatch, out, picture, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").touch()
    budget = ("--bpw", 3, "--group-size", 64)
    assert message in refused("allocate", scores / "zd.json", *budget, "--out", out, "--picture", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_options_that_do_not_fit_the_codes_are_refused_before_any_work(small_model, plan, tmp_path):
    out = tmp_path / "q"
    error = refused("quantize", small_model.path, "--plan", plan, "--out", out, "--option", "convention=symu")
    assert "convention 'symu' does not fit asymmetric codes" in error
    assert not out.exists()
