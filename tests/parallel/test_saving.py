"""Packed parameters that Orbax wrote on one mesh and read onto another: the same to the bit, each device its share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params

from lq.errors import UserError
from lq.parallel import restore_sharded, save_sharded

pytestmark = pytest.mark.once


def on(devices: int, mesh: str, *places: Path) -> dict:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, Path(__file__).parent / "on_another_mesh.py", mesh, *places]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_from_eight_devices_to_four_to_one(tmp_path):
    eight = on(8, "fsdp=2,tensor=4", tmp_path / "eight")
    four = on(4, "data=2,tensor=2", tmp_path / "four", tmp_path / "eight")
    one = on(1, "", tmp_path / "one", tmp_path / "four")
    assert eight["arrays"] == four["arrays"] == one["arrays"]
    assert eight["tree"] == four["tree"] == one["tree"]
    assert 1 / 8 <= eight["share"] < 0.2, "what has its channels ordered is cut along outputs alone"
    assert 1 / 2 <= four["share"] < 0.6
    assert one["share"] == 1
    expected = np.array(one["logits"])
    for found in (eight, four):  # sums in another order
        assert np.abs(np.array(found["logits"]) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture
def saved(tmp_path):
    config = llama_config(2)
    save_sharded(tmp_path / "saved", random_params(config, dtype=jnp.bfloat16))
    return config, tmp_path / "saved"


def test_what_is_there_is_not_written_over(saved):
    config, directory = saved
    with pytest.raises(UserError, match=r"saved: already there; give a new directory"):
        save_sharded(directory, random_params(config))


def test_what_is_no_such_directory_or_of_another_model(saved, tmp_path):
    config, directory = saved
    with pytest.raises(UserError, match=r"nowhere: no parameters written by lq.parallel.save_sharded"):
        restore_sharded(tmp_path / "nowhere", config)
    with pytest.raises(UserError, match=r"of another model than the config, block_1/.* is none of its parameters"):
        restore_sharded(directory, llama_config(1))
    with pytest.raises(UserError, match=r"of another model than the config, block_2/.* is missing"):
        restore_sharded(directory, llama_config(3))


def test_a_bit_that_changed_in_what_describes_the_leaves(saved):
    config, directory = saved
    (file,) = [file for file in (directory / "leaves").iterdir() if b"bfloat16" in file.read_bytes()]
    file.write_bytes(file.read_bytes().replace(b"bfloat16", b"bfloat17", 1))
    with pytest.raises(UserError, match=r"saved: damaged .*checksum does not match"):
        restore_sharded(directory, config)
