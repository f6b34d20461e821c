"""A model on meshes of 8 virtual CPU devices, as JSON. Run as a script: on_eight_devices.py FAMILY [MESH ...].

The number of devices must be set before JAX starts, hence a process of its own.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from random_models import config_of
from small_models import random_params

from lq.allocation import uniform_plan
from lq.calibration.data import Windows
from lq.importance import score
from lq.models.context import DecodeState
from lq.models.decoder import Decoder
from lq.models.generate import generate
from lq.models.matrices import table_matrices
from lq.models.prepared import prepare
from lq.models.source import InMemory
from lq.numerics.spec import QuantSpec
from lq.parallel import make_mesh, place, use
from lq.quantizers import QUANTIZERS, Recipe, quantized_source
from lq_kernels.kv_cache import KVCacheSpec

MESHES = ("data=8", "data=4,tensor=2", "data=2,tensor=4", "tensor=8", "fsdp=2,tensor=4")
EXPERT_MESHES = ("expert=8", "data=2,expert=2,tensor=2")
TOKENS = np.random.default_rng(0).integers(0, 512, (8, 24), np.int32)
SPEC = QuantSpec(bits=3, group_size=32)
COLLECTIVE = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather")


def wide(family: str):
    """The recorded model of a family with matrices that 8 devices can share."""
    config = config_of(family)
    same = config.num_kv_heads == config.num_heads
    experts = config.experts and dataclasses.replace(config.experts, count=8, per_token=2, intermediate_size=256)
    return dataclasses.replace(
        config,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_heads=8,
        num_kv_heads=8 if same else 2,
        head_dim=32,
        experts=experts,
    )


def gathered(program: str) -> set[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of everything that is gathered."""
    found = COLLECTIVE.findall(program)
    return {(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found}


def leaves_of(params) -> set[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array of a matrix, in both orders of its axes."""
    named = {"uint32": "u32", "float32": "f32", "bfloat16": "bf16"}
    found = {(named[leaf.dtype.name], leaf.shape) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    return found | {(dtype, shape[::-1]) for dtype, shape in found}


def on_mesh(config, params, expected, name: str) -> dict:
    with use(make_mesh(name)):
        placed = place(config, params)
        compiled = jax.jit(Decoder(config, jnp.float32).apply).lower({"params": placed}, TOKENS).compile()
        logits = np.asarray(compiled({"params": placed}, TOKENS))
    leaves = jax.tree.leaves(placed)
    return {
        "difference": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "share": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves),
        "gathered": sorted(map(str, gathered(compiled.as_text()) & leaves_of(params))),
    }


def generated(config, params, mesh=None) -> list[list[int]]:
    """Eight rows of twelve tokens."""
    prompts = [row[: 8 + i].tolist() for i, row in enumerate(TOKENS)]
    model = Decoder(config, jnp.float32)
    if mesh is None:
        return generate(model, params, prompts, max_new_tokens=12, stop_ids=())
    with use(mesh):
        return generate(model, place(config, params), prompts, max_new_tokens=12, stop_ids=())


def cache_shares(config, params, mesh, quantized) -> list[float]:
    """Of the arrays of a cache that 40 tokens went into, the share that a device holds."""
    spec = KVCacheSpec(bits=4, group_size=8, residual=8) if quantized else None
    step = functools.partial(Decoder(config, jnp.float32).apply, method="step")
    with use(mesh):
        state = DecodeState.empty(config, len(TOKENS), 40, quantized=spec)
        _, state = jax.jit(step)({"params": place(config, params)}, TOKENS, state)
    leaves = jax.tree.leaves(state.caches)
    return sorted({leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves})


def laid_out_difference(config, params) -> float:
    """Of logits by matrices that are laid out in pieces, from those of one device."""
    expected = np.asarray(jax.jit(Decoder(config, jnp.float32).apply)({"params": params}, TOKENS))
    with use(make_mesh("data=2,tensor=4")):
        laid_out = prepare(place(config, params))
        logits = np.asarray(jax.jit(Decoder(config, jnp.float32).apply)({"params": laid_out}, TOKENS))
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def scores_and_codes(source) -> dict:
    """LIM and ZD, by unit; and the leaves of the model rounded to nearest, and by GPTQ."""
    text = Windows(np.random.default_rng(1).integers(0, 512, (32, 64), np.int32), "random", "random")
    found = {metric: score(source, metric, text).values for metric in ("lim", "zd")}
    for method in ("rtn", "gptq"):
        recipe = Recipe(method=method, options=QUANTIZERS.options(method, {}))
        windows = text if recipe.calibrated else None
        specs = uniform_plan(source.config, SPEC).specs
        quantized = quantized_source(source, specs, recipe, windows)
        found[method] = [np.asarray(leaf) for leaf in jax.tree.leaves(quantized.params())]
        if recipe.calibrated:
            errors = [of_matrix["output error"] for of_matrix in quantized.report.values()]
            found[f"{method} error"] = {"mean": float(np.mean(errors))}
    return found


def differences(found: dict, expected: dict) -> dict[str, float]:
    """The largest relative one of a score; the share of elements of packed arrays that are not the same."""
    shares = {}
    for name, value in expected.items():
        if isinstance(value, dict):
            shares[name] = max(abs(found[name][unit] / wanted - 1) for unit, wanted in value.items())
        else:
            pairs = list(zip(found[name], value, strict=True))
            shares[name] = float(sum((a != b).sum() for a, b in pairs) / sum(b.size for _, b in pairs))
    return shares


def main(family: str, calibrated: list[str]) -> None:
    assert jax.device_count() == 8
    config = wide(family)
    params = random_params(config, dtype=jnp.float32)
    tables = {path: dataclasses.replace(SPEC, bits=4) for path in table_matrices(config)}
    packed = quantized_source(
        InMemory(config, params), uniform_plan(config, SPEC).specs | tables, Recipe(), None
    ).params()
    found = {}
    for kind, tree, meshes in (("dense", params, MESHES[2:3]), ("packed", packed, MESHES)):
        expected = np.asarray(jax.jit(Decoder(config, jnp.float32).apply)({"params": tree}, TOKENS))
        meshes += EXPERT_MESHES if config.experts else ()
        found |= {f"{kind} {name}": on_mesh(config, tree, expected, name) for name in meshes}
    mesh = make_mesh("data=4,tensor=2")
    found = {"meshes": found, "same text": generated(config, packed) == generated(config, packed, mesh)}
    found["cache"] = [cache_shares(config, packed, mesh, quantized) for quantized in (False, True)]
    found["laid out"] = laid_out_difference(config, packed)
    expected, found["calibrated"] = scores_and_codes(InMemory(config, params)) if calibrated else {}, {}
    for name in calibrated:
        with use(make_mesh(name)):
            placed = InMemory(config, place(config, params))
            found["calibrated"][name] = differences(scores_and_codes(placed), expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
