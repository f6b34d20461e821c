"""The closing sentence follows from the rows, whichever way they point."""

import pytest

from lq.runs.conclusion import conclude
from lq.runs.results import Row

pytestmark = pytest.mark.once


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
    )


CHANCE = [row("random", 10.0, 0), row("random", 12.0, 1), row("random", 11.0, 2)]
CONTROLS = [row("first_last", 9.5), row("reverse lim", 20.0)]


def at(budget, rows):
    """The same rows at another budget."""
    return [row(r.order, r.perplexity, r.seed, budget) for r in rows]


@pytest.mark.parametrize(
    ("lim", "said", "verdict"),
    [
        (
            9.0,
            "LIM was better than all random orders at 1, worse than all at 0, better than its controls at 1",
            ": importance helped here, as chance alone would have it in at most 1 of 4 runs.",
        ),
        (
            9.7,
            "better than all random orders at 1, worse than all at 0, better than its controls at 0",
            "a little here.",
        ),
        (10.0, "better than all random orders at 0, worse than all at 0", ": importance did not help here."),
        (11.5, "better than all random orders at 0, worse than all at 0", ": importance did not help here."),
        (13.0, "better than all random orders at 0, worse than all at 1", ": importance did not help here."),
        (float("nan"), "worse than all at 1", ": importance did not help here."),
    ],
)
def test_the_verdict_follows_the_rows(lim, said, verdict):
    sentence = conclude([*CHANCE, *CONTROLS, row("lim", lim)])
    assert sentence.startswith("Against 3 random orders and the controls first_last, reverse at 1 budget, LIM was ")
    assert said in sentence
    assert sentence.endswith(verdict)


@pytest.mark.parametrize("seeds", [1, 2])
def test_nothing_is_said_of_fewer_than_three_random_orders(seeds):
    several = "s" if seeds > 1 else ""
    sentence = (
        f"This run compares with {seeds} random order{several}, and it takes 3 or more to say whether importance helps."
    )
    assert conclude([*CHANCE[:seeds], *CONTROLS, row("lim", 1.0)]) == sentence
    # Three at one budget do not make up for two at another.
    assert "it takes 3 or more" in conclude(
        [*CHANCE, *at(2.5, [*CHANCE[:seeds], *CONTROLS]), row("lim", 1.0, None, 2.5), row("lim", 1.0)]
    )


@pytest.mark.parametrize(
    ("controls", "verdict"),
    [
        ([], "importance did better than chance here, but was not compared with first_last and reverse."),
        (["first_last"], "importance did better than chance here, but was not compared with reverse."),
        (["reverse lim"], "importance did better than chance here, but was not compared with first_last."),
        (["first_last", "reverse zd"], "importance did better than chance here, but was not compared with reverse."),
        (
            ["first_last", "reverse lim"],
            "importance helped here, as chance alone would have it in at most 1 of 4 runs.",
        ),
    ],
)
def test_helped_takes_both_controls(controls, verdict):
    assert conclude([*CHANCE, row("lim", 9.0), *(row(control, 15.0) for control in controls)]).endswith(verdict)


@pytest.mark.parametrize(
    ("perplexities", "verdict"),
    [
        ((9.0, 9.0, 9.0), "importance helped here, as"),
        ((9.0, 9.0, 11.0), "importance helped a little here."),
        ((9.0, 11.0, 11.0), "importance did not help here."),
        ((9.0, 9.0, 13.0), "importance did not help here."),  # worse than every random order at one budget
    ],
)
def test_every_budget_counts(perplexities, verdict):
    rows = []
    for budget, perplexity in zip((3.5, 3.0, 2.5), perplexities, strict=True):
        rows += at(budget, [*CHANCE, *CONTROLS, row("lim", perplexity)])
    sentence = conclude(rows)
    assert "at 3 budgets, LIM was" in sentence
    assert f": {verdict}" in sentence


@pytest.mark.parametrize("control", ["first_last", "reverse lim", "parameter_count"])
def test_a_control_that_does_as_well_takes_the_verdict_away(control):
    rows = [*CHANCE, *CONTROLS, row("lim", 9.0), row(control, 9.0)]
    assert conclude(rows).endswith("better than its controls at 0: importance helped a little here.")


def test_more_scores_tried_are_more_chances():
    rows = [*CHANCE, *CONTROLS, row("lim", 9.0), row("zd", 11.0), row("zd sides=two", 11.0)]
    assert conclude(rows).endswith("as chance alone would have it in at most 3 of 4 runs.")


def test_budgets_where_nothing_is_mixed_are_not_counted():
    same = at(4.0, [row(r.order, 8.0, r.seed) for r in [*CHANCE, *CONTROLS, row("lim", 8.0)]])
    assert " at 1 budget, " in conclude([*same, *CHANCE, *CONTROLS, row("lim", 9.0)])
    assert conclude(same).startswith("At no budget did the orders differ")
    collapsed = [row("random", float("nan"), seed) for seed in range(3)]
    assert conclude([*collapsed, row("lim", float("inf"))]).startswith("At no budget did the orders differ")


def test_without_random_orders_nothing_is_claimed():
    assert conclude([row("lim", 9.0)]).startswith("No order was compared with random orders")
    assert conclude([]).startswith("No order was compared")


def test_other_controls_and_seeded_random_orders_are_no_scores():
    rows = [*CHANCE, row("lim", 13.0), row("parameter_count", 1.0), row("reverse random", 1.0, 0)]
    assert conclude(rows).endswith("importance did not help here.")
    assert "first_last" not in conclude(rows)


def test_it_is_one_sentence():
    for rows in ([], [*CHANCE[:1], row("zd", 1.0)], [*CHANCE, *CONTROLS, row("lim", 9.0), row("zd", 11.0)]):
        sentence = conclude(rows)
        assert sentence.endswith(".")
        assert sentence.count(". ") == 0
        assert "\n" not in sentence
