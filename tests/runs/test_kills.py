"""Ten of the fifty kills of experiments/scale: `lq run` on the shipped model, killed by the system and resumed."""

import pytest

from experiments.scale.kills import Killer, moments

pytestmark = pytest.mark.once

KILLS = 10


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    return Killer(tmp_path_factory.mktemp("kills"))


def test_killed_at_ten_moments_and_resumed_to_the_same_bytes(killer):
    found = [killer.kill(f"killed-{i}", moment) for i, moment in enumerate(moments(killer.seconds, KILLS, seed=1))]
    assert all(kill.same for kill in found), found
    assert len({kill.stage for kill in found}) > KILLS / 3, "moments are spread over stages"
    assert {"scores/lim.json", "rows.jsonl", "results.json", "report.html", "report.png"} <= killer.whole.keys()
