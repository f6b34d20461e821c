"""The closing sentence follows from the rows, whichever way they point."""

import pytest

from lq.runs.conclusion import conclude
from lq.runs.results import Row


def row(order, perplexity, seed=None, budget=3.0):
    return Row(
        name=f"{order} {seed} {budget}",
        group="plan",
        order=order,
        seed=seed,
        target_bpw=budget,
        code_bits=3,
        bpw=3,
        bytes_on_disk=None,
        bytes_on_device=1,
        perplexity=perplexity,
        seconds=0,
    )


CHANCE = [row("random", 10.0, 0), row("random", 12.0, 1), row("random", 11.0, 2)]


@pytest.mark.parametrize(
    ("lim", "said", "verdict"),
    [
        (9.0, "LIM was better than all of them every time (1 of 1)", ": importance helped here."),
        (11.5, "LIM was better than all of them at 0, among them at 1, worse than all at 0", "did not help here."),
        (13.0, "LIM was worse than all of them every time (1 of 1)", ": importance did not help here."),
        (float("nan"), "LIM was worse than all of them every time", "did not help here."),
    ],
)
def test_the_verdict_follows_the_rows(lim, said, verdict):
    sentence = conclude([*CHANCE, row("lim", lim), row("reverse lim", 1.0)])
    assert sentence.startswith("Against 3 random orders at 1 budgets, ")
    assert said in sentence
    assert sentence.endswith(verdict)


def test_a_control_that_beats_every_score_is_named():
    sentence = conclude([*CHANCE, row("lim", 9.0), row("first_last", 8.0)])
    assert "protecting the first and last blocks did better than every score at 1 of 1" in sentence


def test_without_random_orders_nothing_is_claimed():
    assert conclude([row("lim", 9.0)]).startswith("No order was compared with random orders")
    assert conclude([]).startswith("No order was compared")


def test_other_controls_and_seeded_random_orders_are_no_scores():
    rows = [*CHANCE, row("lim", 13.0), row("parameter_count", 1.0), row("random seed=7", 1.0)]
    assert conclude(rows).endswith("importance did not help here.")
    assert "first and last" not in conclude(rows)
