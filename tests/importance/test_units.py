"""Units: every matrix is in one unit of every kind, and a unit's name says which."""

import pytest
from random_models import MODELS, config_of
from small_models import llama_config

from lq.importance.units import members, units_of
from lq.models.matrices import matrices

pytestmark = pytest.mark.once


def test_of_a_block_of_llama():
    config = llama_config(1)
    attention, mlp = "block_0/attention", "block_0/mlp"
    groups = [
        f"{attention}/q_proj+k_proj+v_proj",
        f"{attention}/o_proj",
        f"{mlp}/gate_proj+up_proj",
        f"{mlp}/down_proj",
    ]
    assert set(units_of(config, "block")) == {"block_0"}
    assert set(units_of(config, "part")) == {attention, mlp}
    assert {frozenset(unit.split("/")[-1].split("+")) for unit in units_of(config, "group")} == {
        frozenset(unit.split("/")[-1].split("+")) for unit in groups
    }
    assert list(units_of(config, "matrix")) == list(matrices(config))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("unit", ["block", "part", "group", "matrix"])
def test_every_matrix_is_in_one_unit_that_names_it(case, unit):
    config = config_of(case)
    found, paths = units_of(config, unit), list(matrices(config))
    assert sorted(path for unit in found.values() for path in unit) == sorted(paths)
    for name, mine in found.items():
        assert members(name, paths) == mine


def test_a_name_is_not_the_beginning_of_another():
    paths = ["block_1/mlp/up_proj", "block_11/mlp/up_proj", "block_1/mlp/up_projection"]
    assert members("block_1", paths) == [paths[0], paths[2]]
    assert members("block_1/mlp/up_proj", paths) == paths[:1]
    assert members("block_1/mlp/gate_proj+up_proj", paths) == paths[:1]
