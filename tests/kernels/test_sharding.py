"""Packed products over 8 devices: by output channels, by input channels, by rows; in segments; partitioned by XLA."""

import subprocess
import sys
from pathlib import Path

import pytest

from lq_kernels.cpu.library import library

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parent / "sharded_products.py"


# Not mosaic_gpu: its interpreter takes the barriers of kernels on other devices for its own, and stops.
BACKENDS = ["xla", "xla_scan", *([] if library().reason else ["cpu"]), "mosaic_tpu"]


def test_products_on_eight_devices_equal_float64():
    command = [sys.executable, SCRIPT, *BACKENDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"
