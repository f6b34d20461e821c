"""GPTQ with its output channels over 8 virtual CPU devices. Run as a script by test_gptq.py.

The number of devices must be set before JAX starts, hence a process of its own.
"""

import functools
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.append(str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from calibrated_layers import correlated_inputs, hessian_stats, random_weight
from jax.sharding import PartitionSpec as P

from lq.numerics.spec import QuantSpec
from lq.quantizers.gptq import GPTQOptions, factorize, gptq

K, N = 192, 256


def run(mesh, spec: QuantSpec, options: GPTQOptions) -> None:
    weight = jnp.asarray(random_weight(K, N))
    factor = factorize(hessian_stats(correlated_inputs(500, K)), options)
    sweep = jax.jit(functools.partial(gptq, spec=spec, options=options))
    alone = sweep(weight, factor)

    place = lambda a, *axes: jax.device_put(a, jax.NamedSharding(mesh, P(*axes)))  # noqa: E731
    sharded = place(weight, None, "tensor"), jax.tree.map(place, factor)
    program = sweep.lower(*sharded).compile()
    exchanged = re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)", program.as_text())
    assert not exchanged, f"{spec}: {set(exchanged)}"
    for ours, theirs in zip(program(*sharded), alone, strict=True):
        if theirs is not None:
            assert ours.sharding.spec == P(None, "tensor"), ours.sharding
            np.testing.assert_array_equal(ours, theirs)


if __name__ == "__main__":
    assert jax.device_count() == 8
    devices = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    for symmetric in (False, True):
        for group_size in (64, None):
            run(devices, QuantSpec(bits=3, group_size=group_size, symmetric=symmetric), GPTQOptions())
    run(devices, QuantSpec(bits=3, group_size=64), GPTQOptions(act_order=False, static_groups=False))
    print("ok")
