"""Packed products over 8 devices: by output channels, by input channels, by rows; in segments; partitioned by XLA."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "sharded_products.py"


def test_products_on_eight_devices_equal_float64():
    command = [sys.executable, SCRIPT, "xla", "xla_scan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"
