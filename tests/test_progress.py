"""The time left is that of work which is still to be done."""

import pytest

from lq import progress
from lq.progress import Progress

pytestmark = pytest.mark.once


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys, steps, clock) -> list[str]:
    """`steps` are (seconds, light)."""
    with Progress().stage("work", len(steps)) as step:
        for seconds, light in steps:
            clock[0] += seconds
            step("a part", light=light)
    return [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]


def test_time_left(clock, capsys):
    shown = lines(capsys, [(2.0, False)] * 3, clock)
    assert [line.split(", ")[:2] for line in shown] == [
        ["work 1/3", "0:04 left"],
        ["work 2/3", "0:02 left"],
        ["work 3/3", "0:00 left"],
    ]


def test_what_was_there_already_says_nothing_of_the_rest(clock, capsys):
    """17 parts found in a tenth of a second each, then 3 of ten seconds."""
    shown = lines(capsys, [(0.1, True)] * 17 + [(10.0, False)] * 3, clock)
    assert not any("left" in line for line in shown[:17])
    assert "0:20 left" in shown[17]
    assert "0:10 left" in shown[18]


def test_quiet(clock, capsys):
    with Progress(quiet=True).stage("work", 1) as step:
        step("a part", light=True)
    assert capsys.readouterr().err == ""
