"""The tables in kernels/README.md are those of the recorded results."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "tables.py"


def test_the_readme_says_what_was_recorded():
    assert subprocess.run([sys.executable, SCRIPT, "--check"], check=False).returncode == 0, (
        "results were recorded anew: run python kernels/bench/tables.py"
    )
