"""Packed parameters saved and restored by Orbax. Run as a script: on_another_mesh.py MESH PLACE [FROM].

Quantizes where nothing was saved, restores from FROM otherwise; saves to PLACE; prints a checksum of all arrays and of
the logits, and what share of the bytes a device holds.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from random_models import config_of
from small_models import random_params

from lq.allocation import uniform_plan
from lq.models.decoder import Decoder
from lq.models.matrices import table_matrices
from lq.models.source import InMemory
from lq.numerics.segmented import SegmentedQTensor, run_channels, runs_of
from lq.numerics.spec import QuantSpec
from lq.parallel import make_mesh, place, restore_sharded, save_sharded, use
from lq.quantizers import PlannedSource, Recipe

TOKENS = np.random.default_rng(0).integers(0, 512, (8, 24), np.int32)


def quantized(config):
    """Packed in all the ways that there are: plain, with a low-rank residual, mixed, ordered by energy, tables too."""
    specs = uniform_plan(config, QuantSpec(bits=3, group_size=32)).specs
    specs |= {path: QuantSpec(bits=4, group_size=32, symmetric=True) for path in table_matrices(config)}
    specs["block_0/mlp/up_proj"] = QuantSpec(bits=3, group_size=32, rank=4)
    params = PlannedSource(InMemory(config, random_params(config, dtype=jnp.bfloat16)), specs, Recipe()).params()
    hidden, inner = config.hidden_size, config.intermediate_size
    mlp = params["block_1"]["mlp"]
    mlp["up_proj"]["kernel"] = segmented(QuantSpec(bits=3, group_size=32, mixed=True), (hidden, inner), (2, 4))
    mlp["down_proj"]["kernel"] = segmented(QuantSpec(bits=2, group_size=64, by_energy=True), (inner, hidden), (2,))
    return params


def segmented(spec, shape, widths):
    """Random codes, the channels in a random order."""
    rng, segments = np.random.default_rng(1), []
    for bits, first, stop in runs_of(widths, run_channels(spec, shape[0])):
        side = (spec.num_groups(stop - first), shape[1])
        codes = jnp.asarray(rng.integers(0, 2**bits, (stop - first, shape[1]), np.uint32))
        segments.append((bits, codes, jnp.full(side, 0.02), jnp.full(side, 2 ** (bits - 1), jnp.uint32)))
    return SegmentedQTensor.from_segments(jnp.asarray(rng.permutation(shape[0])), segments, spec, shape)


def main(mesh: str, where: str, earlier: str | None) -> None:
    wide = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_heads": 8, "num_kv_heads": 2}
    config = dataclasses.replace(config_of("llama"), **wide, head_dim=32)
    with use(make_mesh(mesh)) if jax.device_count() > 1 else contextlib.nullcontext():
        params = place(config, quantized(config)) if earlier is None else restore_sharded(earlier, config)
        save_sharded(where, params)
        logits = np.asarray(jax.jit(Decoder(config, jnp.float32).apply)({"params": params}, TOKENS))
    digest, leaves = hashlib.sha256(), jax.tree.leaves(params)
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    found = {"arrays": digest.hexdigest(), "share": held / sum(leaf.nbytes for leaf in leaves)}
    print(json.dumps({**found, "tree": str(jax.tree.structure(params)), "logits": logits[:, -1].ravel().tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3] if len(sys.argv) > 3 else None)
