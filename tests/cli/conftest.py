"""What commands leave for other commands: scores, a plan, a quantized model."""

import pytest
from command import lq


@pytest.fixture(scope="session")
def scores(small_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    status, printed, _ = lq(
        "score", small_model.path, "--metric", "lim", "--metric", "zd", "--out", out, "--calibration", text_file,
        "--samples", 4, "--length", 32, "--quiet",
    )  # fmt: skip
    assert status == 0
    assert "block_2" in printed
    return out


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def quantized(small_model, plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "q"
    status, printed, _ = lq("quantize", small_model.path, "--plan", plan, "--out", out, "--quiet")
    assert status == 0
    assert "of them headers" in printed
    return out
