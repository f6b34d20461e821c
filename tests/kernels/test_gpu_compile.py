"""The Hopper kernels compiled to machine code for an H200, without one: do they fit, and what do they cost?"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"


def _harness():
    spec = importlib.util.spec_from_file_location("gpu_compile", BENCH / "gpu_compile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


harness = _harness()
pytestmark = pytest.mark.skipif(harness.missing() is not None, reason=f"{harness.missing()} here: make test-aot")

MIXED = harness.Case(rows=16, out_features=8192, segments=((4, 4096, 128), (3, 2048, 128), (2, 2048, 128)))
CASES = {
    case.name: case
    for case in [
        *(harness.simple_case(bits, rows) for bits in range(1, 9) for rows in (1, 16, 256)),
        *(harness.simple_case(bits, 1, group=32) for bits in (2, 3, 4, 8)),
        MIXED,
        harness.simple_case(4, 7, K=1000, N=1000, group=1000, x_dtype="float32", out_dtype="float32"),
    ]
}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    return {report["case"]: report for report in harness.compile_cases(list(CASES.values()))}


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict]:
    return json.loads(harness.RESULTS.read_text())


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills_into_shared_memory(reports, name):
    report = reports[name]
    assert "error" not in report
    assert report["spill_bytes"] == 0
    assert report["shared_bytes"] <= harness.SHARED_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_register_operand(reports, name):
    loops = reports[name]["loops"]
    assert len(loops) == len(CASES[name].segments)  # one main loop for each width
    assert all(loop["register_a"] for loop in loops)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_never_written_out_unpacked(reports, name):
    report, case = reports[name], CASES[name]
    channels = sum(-(-k // 128) * 128 for _, k, _ in case.segments)
    # Beside x as the kernel reads it there are partial results, at most one for each block.
    rows = max(case.rows, report["config"]["token_tile"]) * {"bfloat16": 1, "float32": 3}[case.x_dtype]
    padded = -(-rows // 8) * 8 + 128
    partial = 4 * 8 * padded * -(-case.out_features // 128) * 128
    assert report["temp_bytes"] <= 2 * 2 * padded * channels + partial
    assert report["temp_bytes"] < report["bf16_weight_bytes"] / 4 or case.out_features < 8192


@pytest.mark.parametrize("name", [name for name in CASES if "8192x8192" in name])
def test_instructions_per_weight_stay_what_they_were(reports, recorded, name):
    now = [loop["per_weight"] for loop in reports[name]["loops"]]
    then = [loop["per_weight"] for loop in recorded[name]["loops"]]
    assert all(a <= 1.1 * b for a, b in zip(now, then, strict=True)), (now, then)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_row_is_unpacked_as_fast_as_memory_delivers(reports, bits):
    (loop,) = reports[harness.simple_case(bits, 1).name]["loops"]
    assert loop["per_weight"] <= harness.BUDGET[bits]


def test_main_loops_are_the_innermost_that_multiply():
    sass = """
.L_x_1:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   HGMMA.64x8x16.F32.BF16 R32, R24, gdesc[UR16], RZ, !UPT ;
        /*0020*/              @!P2 BRA `(.L_x_2) ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
    """
    (loop,) = harness.main_loops(sass)
    assert (loop["instructions"], loop["weights"], loop["register_a"], loop["tokens"]) == (2, 8, True, 8)
    assert not harness.main_loops(re.sub("R24", "gdesc[UR8]", sass))[0]["register_a"]
