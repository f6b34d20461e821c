"""What every command prints, writes and exits with."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from command import lq, refused
from small_models import llama_config, random_params, write_directory

from lq import assets
from lq.allocation import Plan
from lq.cli import main
from lq.quantizers import QUANTIZERS


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


@pytest.mark.parametrize("verb", ["allocate", "quantize"])
def test_the_help_says_who_uses_interactions(verb):
    assert "only quadratic uses interactions" in " ".join(re.sub(r"[^\w\s]", " ", lq(verb, "--help")[1]).split())
