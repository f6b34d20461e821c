"""Pictures of plans: what is in a cell, and what cannot be drawn."""

import dataclasses

import numpy as np
import pytest
from small_models import llama_config

from lq.allocation import uniform_plan
from lq.errors import UserError
from lq.importance.scores import Scores
from lq.models.matrices import matrices, model_shapes
from lq.numerics.spec import QuantSpec
from lq.runs.figures.plans import matrix_bits, write_damage_figure, write_plan_figure

pytestmark = pytest.mark.once

CONFIG = llama_config(3)


def scores(metric, values):
    return Scores(metric=metric, values=values, model="m", shapes=model_shapes(CONFIG), other_weights=0)


def test_cells_hold_the_mean_width_of_codes(tmp_path):
    plan = uniform_plan(CONFIG, QuantSpec(bits=3, group_size=32))
    specs = {**plan.specs, "block_1/mlp/down_proj": QuantSpec(bits=4, group_size=32, widths=(4, 2, 2, 2))}
    del specs["block_2/attention/q_proj"]
    plan = dataclasses.replace(plan, specs=specs)
    names, bits = matrix_bits(plan)
    assert bits.shape == (7, 3)
    expected = np.full((7, 3), 3.0)
    expected[names.index("mlp/down_proj"), 1] = 2.5
    expected[names.index("attention/q_proj"), 2] = 16.0
    np.testing.assert_array_equal(bits, expected)
    write_plan_figure(plan, tmp_path / "plan.png")
    first = (tmp_path / "plan.png").read_bytes()
    write_plan_figure(plan, tmp_path / "plan.png")
    assert first[:4] == b"\x89PNG"
    assert (tmp_path / "plan.png").read_bytes() == first, "equal plans give equal bytes"


def test_scores_against_measured_damage(tmp_path):
    paths = list(matrices(CONFIG))
    damage = scores("kl", {path: 0.01 * (1 + i) for i, path in enumerate(paths)})
    given = {name: scores(name, {path: float(i) for i, path in enumerate(paths)}) for name in "abcd"}
    write_damage_figure(given, damage, tmp_path / "damage.png")
    assert (tmp_path / "damage.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="lim: 0 units in common with kl; score the same units"):
        write_damage_figure({"lim": scores("lim", {"block_0": 1.0})}, damage, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
