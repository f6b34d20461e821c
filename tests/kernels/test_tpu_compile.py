"""Compiles the TPU kernels with the TPU's own compiler, libtpu, on a machine without a TPU.

Every chip and width must compile, make no bfloat16 copy of the weights, and cost no more bundles than recorded in
kernels/bench/results/static_cost_tpu.json. The record belongs to one libtpu. Under another one the costs are another
compiler's: what must hold on any is still tested, the comparison with the record fails only beyond `OTHER_COMPILER`,
and the message says how to record anew.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))
import tpu_cost  # noqa: E402

sys.path.remove(str(BENCH))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed here: make test-aot"
)

SAME_COMPILER, OTHER_COMPILER = 1.10, 1.5  # times the recorded cost
SMALL = 1 << 16  # bytes of temporaries that are no copy of anything
RECORD = json.loads(tpu_cost.RECORD.read_text(encoding="utf-8"))
CASES = tpu_cost.cases()
LONG = ("v4", "v5p")  # an older chip, and one with the units of v5e


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name.startswith(LONG) else name for name in CASES]
)
def test_compiles_without_a_copy_of_the_weights_at_the_recorded_cost(name):
    case, recorded = CASES[name], RECORD["costs"][name]
    version = tpu_cost.libtpu_version()
    tolerance = SAME_COMPILER if version == RECORD["libtpu"] else OTHER_COMPILER
    for result, before in zip(tpu_cost.measure(**case), recorded, strict=True):
        M = result["rows"]
        assert before["rows"] == M
        assert result["temp"] < 2 * 4 * M * (tpu_cost.CHANNELS + tpu_cost.COLUMNS) + result["sides"] + SMALL
        assert result["spills"] <= before["spills"] * tolerance + 16, f"{M} rows: more spills than recorded"
        assert result["whole"] <= before["whole"] * tolerance, (
            f"{M} rows: {result['whole']} bundles per 1024 weights with libtpu {version}, recorded {before['whole']} "
            f"with {RECORD['libtpu']}. If that is intended: python kernels/bench/tpu_cost.py --record --only '{name}'"
        )


def test_the_record_is_whole():
    assert list(RECORD["costs"]) == list(CASES)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_decode_is_limited_by_memory_where_the_matrix_unit_allows(chip):
    """What the record claims: whole kernels of 1 and 16 rows, within what memory needs to deliver the weights."""
    least = {"v5e": {1: 2, 16: 3}, "v5p": {1: 2, 16: 4}, "v6e": {1: 3, 16: 4}}[chip]  # bits
    for bits in range(2, 9):
        for result in RECORD["costs"][f"{chip} {bits}bit"]:
            if bits >= least.get(result["rows"], 9):
                assert result["whole"] <= result["budget"], (bits, result["rows"])


@pytest.mark.parametrize("chip", ["v6e", "v7x"])
def test_many_rows_cost_what_a_dense_product_does(chip):
    """What the record claims: 256-deep dots, within a tenth of a product of bfloat16 weights and nothing else."""
    dense = json.loads((BENCH / "results" / "static_cost_tpu_dense.json").read_text(encoding="utf-8"))
    for result in RECORD["costs"][f"{chip} 4bit prefill"]:
        limit = dense["per_1024_weights"][chip][str(result["rows"])]["bundles"]
        assert result["whole"] <= 1.10 * limit, result["rows"]
