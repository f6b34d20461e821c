"""Windows of tokens: exact protocols, and one line for what cannot be cut."""

import sys
import types

import numpy as np
import pytest

from lq.calibration.data import calibration_windows, evaluation_windows, read_text
from lq.errors import UserError


class Words:
    """A tokenizer of whitespace words that numbers them by first appearance in the text it was made of."""

    def __init__(self, text):
        self.ids = {word: i for i, word in enumerate(dict.fromkeys(text.split()))}
        self.calls = 0

    def __call__(self, text, verbose=True):
        self.calls += 1
        return {"input_ids": [self.ids[word] for word in text.split()]}


@pytest.fixture
def counting(tmp_path):
    """A text of the words 0 1 2 ... 99, where a token is its own place."""
    path = tmp_path / "t.txt"
    path.write_text(" ".join(map(str, range(100))))
    return Words(path.read_text()), str(path)


def test_windows_are_consecutive_and_the_remainder_is_dropped(counting):
    tokenizer, path = counting
    windows = evaluation_windows(tokenizer, path, 30)
    np.testing.assert_array_equal(windows.tokens, np.arange(90).reshape(3, 30))
    assert tokenizer.calls == 1, "the text is tokenized once"


def test_stride_and_limit(counting):
    windows = evaluation_windows(*counting, 30, stride=20, limit=3)
    assert windows.tokens[:, 0].tolist() == [0, 20, 40]
    assert evaluation_windows(*counting, 100).tokens.shape == (1, 100)
    assert evaluation_windows(*counting, 30, stride=10).tokens[-1, -1] == 99


@pytest.mark.parametrize("stride", [-1, 0, 31])
def test_a_stride_beyond_the_window_is_refused(counting, stride):
    with pytest.raises(UserError, match=r"stride: .* is not between 1 and the window of 30 tokens"):
        evaluation_windows(*counting, 30, stride=stride)


def test_calibration_windows_are_places_in_the_text_decided_by_the_seed(counting):
    windows = calibration_windows(*counting, samples=8, length=10, seed=3)
    assert (np.diff(windows.tokens, axis=1) == 1).all()
    again = calibration_windows(*counting, samples=8, length=10, seed=3)
    assert windows.fingerprint == again.fingerprint
    assert windows.fingerprint != calibration_windows(*counting, samples=8, length=10, seed=4).fingerprint
    assert calibration_windows(*counting, samples=2, length=100).tokens.shape == (2, 100)


def test_a_text_shorter_than_a_window_is_one_line(counting):
    for cut in (
        lambda: evaluation_windows(*counting, 101),
        lambda: calibration_windows(*counting, samples=1, length=101),
    ):
        with pytest.raises(UserError, match="100 tokens, fewer than one window of 101; give more text or a shorter"):
            cut()


@pytest.mark.parametrize(
    ("cut", "changes", "message"),
    [
        (evaluation_windows, {"length": 1}, "length: 1; write 2 or more"),
        (evaluation_windows, {"limit": 0}, "limit: 0; write 1 or more"),
        (evaluation_windows, {"limit": -3}, "limit: -3; write 1 or more"),
        (calibration_windows, {"samples": 4, "length": 0}, "length: 0; write 2 or more"),
        (calibration_windows, {"samples": 0}, "samples: 0; write 1 or more"),
        (calibration_windows, {"samples": 4, "seed": -1}, "seed: -1; write 0 or more"),
    ],
)
def test_counts_that_cannot_be_are_one_line(counting, cut, changes, message):
    with pytest.raises(UserError, match=message):
        cut(*counting, **{"length": 10, **changes})


def test_text_is_read_from_files_and_directories(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_text(tmp_path) == "first\n\nsecond"
    with pytest.raises(UserError, match="no such text file"):
        read_text(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_text(tmp_path / "c.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a directory without \.txt files"):
        read_text(tmp_path / "empty")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the datasets package: records what is asked for, gives documents of known words."""
    asked = []

    class Rows(list):
        def __getitem__(self, key):
            if key == "text":
                return [row["text"] for row in self]
            picked = super().__getitem__(key)
            return Rows(picked) if isinstance(key, slice) else picked

    def load_dataset(*name, split, data_files=None):
        asked.append((name, split, data_files))
        return Rows({"text": " ".join([f"w{i}"] * (i % 7 + 1))} for i in range(1200))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


WORDS = Words(" ".join(f"w{i}" for i in range(1200)))


def test_wikitext2_is_the_raw_test_split_joined_by_blank_lines(hub):
    windows = evaluation_windows(WORDS, "wikitext2", 5)
    assert hub == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), "test", None)]
    assert windows.tokens[0].tolist() == [0, 1, 1, 2, 2]
    calibration_windows(WORDS, "wikitext2", 2, 5)
    assert hub[-1][1] == "train"


def test_c4_is_1100_validation_documents_and_256_windows(hub):
    windows = evaluation_windows(WORDS, "c4", 5)
    assert hub == [(("allenai/c4",), "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"})]
    assert len(windows.tokens) == 256
    assert 1090 < evaluation_windows(WORDS, "c4", 20, limit=10_000).tokens.max() < 1100


def test_c4_calibration_takes_windows_inside_documents_longer_than_one(hub):
    windows = calibration_windows(WORDS, "c4", samples=12, length=5)
    assert hub == [(("allenai/c4",), "train", {"train": "en/c4-train.00000-of-01024.json.gz"})]
    assert (windows.tokens == windows.tokens[:, :1]).all(), "a window never crosses documents"
    assert (windows.tokens[:, 0] % 7 + 1 > 5).all()


def test_without_the_datasets_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets package; pip install 'lq\[eval\]', or give a text file"):
        evaluation_windows(WORDS, "wikitext2", 5)
