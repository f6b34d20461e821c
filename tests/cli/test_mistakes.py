"""A mistake is one line and status 2, and leaves nothing behind."""

import shutil
import sys

import pytest
from command import refused
from small_models import llama_config, random_params, write_directory

from lq.cli import main


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
        (
            ("score", "MODEL", "--metric", "zd", "--out", "/dev/null/x"),
            "/dev/null is a file; give a place in a directory",
        ),
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


def test_a_path_that_cannot_be_used_is_one_line(scores, tmp_path):
    assert "directory" in refused("allocate", scores / "zd.json", "--bpw", 3, "--group-size", 64, "--out", tmp_path)
    assert f"{tmp_path}: a directory; give a file that `lq score`" in refused("allocate", tmp_path, "--bpw", 3)


@pytest.mark.parametrize(
    ("out", "picture", "message"),
    [
        ("a.json", "a.json", "--picture a.json: is that of --out as well; give another"),
        ("a.json", "./a.json", "--picture a.json: is that of --out as well; give another"),
        ("SCORES", "a.png", "is that of the scores as well; give another"),
        ("a.json", "SCORES", "is that of the scores as well; give another"),
        ("a.json", ".", "--picture .: a directory; give a file"),
        ("a.json", "f/a.png", "f is a file; give a place in a directory"),
        (".", "a.png", "--out .: a directory; give a file"),
        ("f/a.json", "a.png", "f is a file; give a place in a directory"),
    ],
)
def test_neither_plan_nor_picture_is_written_when_one_cannot_be(scores, tmp_path, monkeypatch, out, picture, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").touch()
    budget, given = ("--bpw", 3, "--group-size", 64), scores / "zd.json"
    before = given.read_bytes()
    out, picture = (given if path == "SCORES" else path for path in (out, picture))
    assert message in refused("allocate", given, *budget, "--out", out, "--picture", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert given.read_bytes() == before


def test_options_that_do_not_fit_the_codes_are_refused_before_any_work(small_model, plan, tmp_path):
    out = tmp_path / "q"
    error = refused("quantize", small_model.path, "--plan", plan, "--out", out, "--option", "convention=symu")
    assert "convention 'symu' does not fit asymmetric codes" in error
    assert not out.exists()
