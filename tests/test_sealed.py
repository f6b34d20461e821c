"""Checksums inside JSON files, and directories that one process holds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lq.errors import UserError
from lq.lock import LOCK, held
from lq.sealed import sealed, unsealed

DATA = {"b": [1, 2.5, float("nan")], "a": {"2": None, "10": "ä"}, "numbers": {2: 0, 10: 1}, "tuple": (1, 2)}


def test_what_was_sealed_is_given_back_as_json_gives_it():
    again = unsealed(json.loads(json.dumps(sealed(DATA), indent=3)))
    assert json.dumps(again) == json.dumps(json.loads(json.dumps(DATA)))


def test_spaces_and_the_order_of_keys_say_nothing():
    shuffled = dict(reversed(list(sealed(DATA).items())))
    unsealed(json.loads(json.dumps(shuffled, separators=(" , ", " : "))))


def test_every_bit_of_what_it_says_is_covered():
    """A changed bit is found, or is in the name of the checksum itself, where the rest is as it was."""
    data = {"name": "lim", "values": [0.125, 12]}
    text = json.dumps(sealed(data)).encode()
    passed = 0
    for i in range(8 * len(text)):
        changed = bytearray(text)
        changed[i // 8] ^= 1 << i % 8
        try:
            found = unsealed(json.loads(changed))
        except ValueError:
            continue
        passed += 1
        assert {key: found[key] for key in data} == data
    assert passed < 8 * len("sha256")


def test_what_carries_no_checksum_passes():
    assert unsealed({"a": 1}) == {"a": 1}
    assert unsealed([1]) == [1]


HOLD = """
import sys, time
from pathlib import Path
from lq.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "x" / "d")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process, tmp_path / "x" / "d"
    process.kill()
    process.wait()


def test_a_directory_is_held_by_one_process_and_given_up_by_its_death(holder):
    process, directory = holder
    with (
        pytest.raises(UserError, match=rf"d: process {process.pid} on .* writes to it; wait for that to end"),
        held(directory),
    ):
        pass
    assert (directory / LOCK).exists(), "the other's"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (directory / LOCK).exists()
    with held(directory):
        assert (directory / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (directory / LOCK).exists()


def test_a_directory_that_was_made_and_stays_empty_goes(tmp_path):
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_directory_that_was_there_stays(tmp_path):
    with held(tmp_path):
        pass
    assert Path(tmp_path).is_dir()
