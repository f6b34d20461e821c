"""What the README shows works as it stands."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def code_block(text: str) -> str:
    return textwrap.dedent("".join(re.findall(r"^(?: {4}.*\n|\n)+", text, re.M)))


def test_the_library_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    example = code_block(section("The library"))
    for many, few in [("samples=32", "samples=4"), ("limit=8", "limit=2"), ("max_new_tokens=64", "max_new_tokens=8")]:
        assert many in example
        example = example.replace(many, few)  # for time
    exec(compile(example, "README", "exec"), names)
    assert names["plan"].bpw <= 3.0
    assert names["logits"].shape == (1, 512, 4096)
    assert np.isfinite(np.asarray(names["logits"])).all()
    import lq

    model, params, _ = lq.load(tmp_path / "standin-3.0")
    again = model.apply({"params": params}, names["calib"].tokens[:1])
    np.testing.assert_array_equal(np.asarray(again), np.asarray(names["logits"]))
    assert lq.open_model(tmp_path / "standin-3.0-gptq").plan == names["plan"]


def test_every_file_and_folder_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_first_screen_says_what_to_type():
    first = README.split("\n## ")[0]
    assert "make demo" in first
    assert "make test" in first
    assert len(first.splitlines()) <= 24
