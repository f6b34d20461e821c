"""Registries: unknown names and options are one line that says what there is."""

import dataclasses
from typing import Literal

import pytest

from lq.errors import UserError
from lq.registry import Method, Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    clip: Literal["none", "mse"] = "mse"
    steps: int = 3
    share: float | None = None
    loud: bool = False


def shrink():
    """Makes things smaller.

    Nothing else.
    """


THINGS = Registry("thing", {"shrink": Method(function=shrink, options=Options)})


def test_names():
    assert list(THINGS) == ["shrink"]
    assert THINGS["shrink"].summary == "Makes things smaller."
    with pytest.raises(UserError, match=r"unknown thing 'shrnk'; known: shrink; did you mean shrink\?"):
        THINGS["shrnk"]
    assert "shrnk" not in THINGS


@pytest.mark.parametrize("given", [{}, {"clip": "none"}, {"share": 1}, {"share": None}, {"steps": 2, "loud": True}])
def test_options_that_fit(given):
    assert dataclasses.asdict(THINGS.options("shrink", given)).items() >= given.items()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clips": 1}, "thing shrink: unknown option 'clips'; options: clip, steps, share, loud"),
        ({"clip": "max"}, "option clip: 'max' is not one of none, mse"),
        ({"steps": 2.5}, "option steps: 2.5 is not a whole number"),
        ({"steps": True}, "option steps: True is not a whole number"),
        ({"share": "half"}, "option share: 'half' is not a number or null"),
        ({"loud": 1}, "option loud: 1 is not true or false"),
    ],
)
def test_options_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        THINGS.options("shrink", given)
