"""What a model takes on every device of a mesh, from its config alone: nothing is read, nothing allocated.

Weights and caches are counted array by array, as they would lie on the mesh. What a program needs besides only its
compiler knows: where one for the target is installed, a forward step through `BLOCKS` blocks is compiled for it. Blocks
run one after another and their temporaries share their place, so that more blocks need no more.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.stages import Lowered

from lq.models.config import ModelConfig
from lq.models.context import DecodeState, axes_of_cache
from lq.models.decoder import Decoder, abstract_params
from lq.models.generate import kv_cache_spec
from lq.models.layout import axes_of
from lq.models.prepared import prepare
from lq.numerics.matmul import Pieces
from lq.numerics.segmented import abstract_packed
from lq.numerics.sharded import leaf_shardings, rows_spec
from lq.numerics.spec import QuantSpec
from lq.parallel.mesh import use_abstractly

BLOCKS = 2  # that are compiled: a first and another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A forward step: rows of text, new tokens of each, and the tokens that the cache has room for."""

    batch: int = 1
    tokens: int = 1
    length: int = 8192
    kv_bits: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of `BLOCKS` blocks, a device: bytes; operations and bytes moved, None if it does not."""

    temporaries: int
    flops: float | None
    bytes_accessed: float | None


def abstract_model(config: ModelConfig, specs: Mapping[str, QuantSpec], dtype=jnp.bfloat16) -> Any:
    """The parameter tree with matrices packed as `specs` says and all else in `dtype`: shapes alone."""
    flat: dict[str, Any] = flatten_dict(abstract_params(config), sep="/")
    found: dict[str, Any] = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in flat.items()}
    for path, spec in specs.items():
        leaf = "embed/tokens/embedding" if path == "embed/tokens" else f"{path}/kernel"
        shape = flat[leaf].shape[::-1] if path == "embed/tokens" else flat[leaf].shape
        found[leaf] = abstract_packed(spec, shape)
    return unflatten_dict(found, sep="/")


def sharded_model(config: ModelConfig, model: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The same with the sharding of every array."""
    found = {}
    with use_abstractly(mesh):
        for path, leaf in flatten_dict(model, sep="/").items():
            where = leaf_shardings(leaf, axes_of(config, path, leaf), mesh)
            found[path] = jax.tree.map(_with_sharding, leaf, where)
    return unflatten_dict(found, sep="/")


def sharded_state(config: ModelConfig, step: Step, mesh: Mesh | AbstractMesh, dtype=jnp.bfloat16) -> Any:
    """A `DecodeState` whose caches have shardings; the rest, some numbers a token, is on every device."""
    quantized = kv_cache_spec(step.kv_bits)
    state: Any = jax.eval_shape(lambda: DecodeState.empty(config, step.batch, step.length, dtype, quantized=quantized))
    with use_abstractly(mesh):
        where = lambda leaf: NamedSharding(mesh, rows_spec(leaf.shape, axes_of_cache(leaf), mesh))  # noqa: E731
        caches = jax.tree.map(lambda leaf: _with_sharding(leaf, where(leaf)), state.caches)
    whole = NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.tree.map(lambda leaf: _with_sharding(leaf, whole), state)
    return dataclasses.replace(state, caches=caches)


def device_bytes(tree: Any) -> int:
    """Bytes that each device holds of arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def prepared_model(model: Any, mesh: Mesh) -> Any:
    """The same with matrices laid out for the devices of `mesh`, as generating text has them."""
    device = mesh.devices.flat[0]
    where = {"platform": device.platform, "device_kind": device.device_kind}
    pieces = lambda node: isinstance(node, Pieces)  # noqa: E731

    def sharded(old: Any, new: Any) -> Any:
        if not pieces(new):
            return jax.tree.map(lambda leaf, before: _with_sharding(leaf, before.sharding), new, old)
        axis = NamedSharding(mesh, jax.sharding.PartitionSpec(new.cut.inputs or new.cut.outputs))
        return jax.tree.map(lambda leaf: _with_sharding(leaf, axis), new)

    with use_abstractly(mesh):
        laid_out: Any = jax.eval_shape(functools.partial(prepare, **where), model)
    if mesh.size == 1:  # what is laid out is no longer packed as it was, and nothing is in pieces
        whole = NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda leaf: _with_sharding(leaf, whole), laid_out)
    before = flatten_dict(model, sep="/")
    after = flatten_dict(laid_out, sep="/", is_leaf=lambda _, node: pieces(node))
    return unflatten_dict({path: sharded(before.get(path), leaf) for path, leaf in after.items()}, sep="/")


def lowered_step(config: ModelConfig, specs: Mapping[str, QuantSpec], step: Step, mesh: Mesh, blocks: int) -> Lowered:
    """A step of the model's first blocks, its embedding and its head, to be compiled for the devices of `mesh`."""
    short = dataclasses.replace(config, kinds=config.kinds[:blocks])
    kept = {path: spec for path, spec in specs.items() if not _is_beyond(path, len(short.kinds))}
    model = prepared_model(sharded_model(short, abstract_model(short, kept), mesh), mesh)
    state = sharded_state(short, step, mesh)
    tokens = jax.ShapeDtypeStruct((step.batch, step.tokens), jnp.int32)
    apply = functools.partial(Decoder(short, jnp.bfloat16).apply, logits_to_keep=1, method="step")
    with use_abstractly(mesh):
        return jax.jit(apply, donate_argnums=2).lower({"params": model}, tokens, state)


def compiled_step(config: ModelConfig, specs: Mapping[str, QuantSpec], step: Step, mesh: Mesh) -> Compiled:
    """What the compiler says of `lowered_step` of `BLOCKS` blocks."""
    with use_abstractly(mesh):
        compiled = lowered_step(config, specs, step, mesh, BLOCKS).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    if memory is None:
        raise RuntimeError("the compiler gives no memory analysis")
    return Compiled(
        temporaries=int(memory.temp_size_in_bytes), flops=cost.get("flops"), bytes_accessed=cost.get("bytes accessed")
    )


def _is_beyond(path: str, blocks: int) -> bool:
    part = path.split("/")[0]
    return part.startswith("block_") and int(part.removeprefix("block_")) >= blocks


def _with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
