"""A block reconstructed with its output channels over 8 virtual CPU devices. Run as a script by test_learned.py.

The number of devices must be set before JAX starts, hence a process of its own.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.append(str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from small_models import llama_config, random_params

from lq.models.matrices import block_matrices
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, over_local_devices
from lq.quantizers.reconstruct import BlockFunction

SPEC = QuantSpec(bits=2, group_size=32)


def check(method: str) -> None:
    config = llama_config(1)
    apply, params = BlockFunction(config, config.kinds[0]), random_params(config, dtype=jnp.float32)["block_0"]
    inputs = np.random.default_rng(0).standard_normal((4, 32, config.hidden_size)).astype(np.float32)
    targets = np.asarray(apply(params, jnp.asarray(inputs)))
    specs = dict.fromkeys(block_matrices(config, config.kinds[0]), SPEC)
    reconstruct, options = QUANTIZERS[method].block, QUANTIZERS.options(method, {"steps": 40})
    alone, once = reconstruct(apply, params, inputs, targets, specs, options)
    sharded, over = reconstruct(apply, params, inputs, targets, specs, options, place=over_local_devices())
    for path, tensors in sharded.items():
        for ours, theirs in zip(tensors, alone[path], strict=True):
            assert len(ours.sharding.device_set) == 8, path
            assert ours.addressable_shards[0].data.shape == (*ours.shape[:-1], ours.shape[-1] // 8), path
            assert ours.shape == theirs.shape
    # Sums are taken in another order, and the descent amplifies it; where it ends is as good.
    assert abs(over.before / once.before - 1) < 1e-5
    assert abs(over.after / once.after - 1) < 0.02, (method, over.after, once.after)
    assert over.after < 0.8 * over.before, method


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name in ("autoround", "adaquant"):
        check(name)
    print("ok")
