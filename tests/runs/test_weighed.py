"""A dense model's size is that of its own arrays."""

import jax
import jax.numpy as jnp
import pytest
from small_models import llama_config, random_params

from lq.models.source import InMemory
from lq.runs.weighed import Weighed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_bytes_and_bits_are_those_of_the_stored_dtype(dtype, tied):
    config = llama_config(2, tied=tied)
    params = random_params(config, dtype=dtype)
    weighed = Weighed(InMemory(config, params))
    weighed.params()
    weighed.embed()  # read twice, counted once
    assert weighed.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert weighed.bits_per_weight("blocks") == weighed.bits_per_weight("all") == 8 * jnp.dtype(dtype).itemsize


def test_bits_are_over_what_plans_count():
    config = llama_config(2)
    params = random_params(config)
    params["embed"] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["embed"])
    weighed = Weighed(InMemory(config, params))
    weighed.params()
    assert weighed.bits_per_weight("blocks") == 16
    embedding = params["embed"]["tokens"]["embedding"].size
    blocks = sum(
        leaf.size for name in ("block_0", "block_1") for leaf in jax.tree.leaves(params[name]) if leaf.ndim > 1
    )
    assert weighed.bits_per_weight("all") == (16 * blocks + 32 * embedding) / (blocks + embedding)
