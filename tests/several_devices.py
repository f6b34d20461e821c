"""The library's functions on 8 virtual CPU devices. Run as a script by test_api.py.

The number of devices must be set before JAX starts, hence a process of its own.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parent.parent)])

import jax
import numpy as np
from small_models import llama_config, random_params

import lq
from lq.models.decoder import Decoder
from lq.models.matrices import matrices
from lq.numerics.spec import QuantSpec
from lq.quantizers import placement

CONFIG = llama_config(1)
WINDOWS = lq.Windows(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32), np.int32), "random", "random")
PARAMS, PLACED = random_params(CONFIG), []


def recorded(mesh):
    def place(weight):
        placed = over_columns(mesh)(weight)
        PLACED.append(len(placed.sharding.device_set))
        return placed

    return place


def check(method: str, options, device) -> None:
    """All matrices are laid out over all devices, and what is made of them is on the one they came from."""
    PLACED.clear()
    params, plan = jax.device_put(PARAMS, device), lq.uniform_plan(CONFIG, QuantSpec(bits=3, group_size=32))
    given = {"method": method, "options": options, "calibration": WINDOWS, "quiet": True}
    packed = lq.quantize(Decoder(CONFIG), params, plan, **given)
    assert [8] * len(matrices(CONFIG)) == PLACED, (method, PLACED)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(packed)), method
    assert np.isfinite(np.asarray(Decoder(CONFIG).apply({"params": packed}, WINDOWS.tokens))).all()


if __name__ == "__main__":
    assert jax.device_count() == 8
    over_columns, placement.over_columns = placement.over_columns, recorded
    check("rtn", {"clip": "none"}, jax.devices()[0])
    check("gptq", {}, jax.devices()[3])
    check("autoround", {"steps": 1}, jax.devices()[3])
    print("ok")
