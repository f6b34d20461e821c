"""Products of a packed matrix on 8 virtual CPU devices, checked against float64. Run as a script by test_sharding.py.

The number of devices must be set before JAX starts, hence a process of its own.
"""

import dataclasses
import functools
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from products import assert_product, random_matrix, random_rows, random_segments

from lq_kernels import PreparedMatrix, explain, prepare, quantized_matmul

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def everywhere(tree, spec):
    return jax.tree.map(lambda leaf: spec, tree)


def run(backend: str | None, check_vma: bool) -> None:
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AUTO,))
    shard = lambda f, ins, out: jax.jit(  # noqa: E731
        jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=out, check_vma=check_vma)
    )
    product = lambda x, w: quantized_matmul(x, w, backend=backend)  # noqa: E731
    w, x = random_matrix(4, 1024, 256, 64), random_rows(8, 1024)

    columns = shard(product, (P(), everywhere(w, P(None, "tensor"))), P(None, "tensor"))
    assert_product(columns(x, w), x, w)

    def partial_sum(x, w):
        return jax.lax.psum(product(x, dataclasses.replace(w, in_features=1024 // 8)), "tensor")

    rows = shard(partial_sum, (P(None, "tensor"), everywhere(w, P("tensor"))), P())
    assert_product(rows(x, w), x, w)

    batch = shard(product, (P("tensor"), everywhere(w, P())), P("tensor"))
    assert_product(batch(x, w), x, w)

    # Each of two segments is cut in 8 along the input channels; the permutation is applied before the cut.
    mixed = random_segments((2, 5), (1024, 2048), 256, 64)
    x_mixed = random_rows(8, 3072)

    def segment_sums(parts, segments):
        local = [dataclasses.replace(s, in_features=s.in_features // 8) for s in segments]
        return jax.lax.psum(sum(product(p, s) for p, s in zip(parts, local, strict=True)), "tensor")

    ordered = x_mixed[:, mixed.permutation]
    segments = shard(segment_sums, ((P(None, "tensor"),) * 2, everywhere(mixed.segments, P("tensor"))), P())
    assert_product(segments((ordered[:, :1024], ordered[:, 1024:]), mixed.segments), x_mixed, mixed)

    pull = jax.grad(lambda x: (columns(x, w) ** 2).sum())(x)
    whole = jax.grad(lambda x: (quantized_matmul(x, w, backend="xla") ** 2).sum())(x)
    assert jnp.abs(pull - whole).max() <= 1e-5 * jnp.abs(whole).max()


def run_prepared(backend: str, check_vma: bool, interpret) -> None:
    """Every device lays its own part out, once; static facts are the part's, so any product may then take it."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AUTO,))
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    w, x = random_matrix(3, 1024, 1024, 128), random_rows(2, 1024)
    lay_out = functools.partial(prepare, backend=backend)
    product = functools.partial(quantized_matmul, backend=backend, interpret=interpret)

    laid_out = jax.jit(shard(lay_out, in_specs=P(None, "tensor"), out_specs=P("tensor")))(w)
    columns = shard(product, in_specs=(P(), P("tensor")), out_specs=P(None, "tensor"))
    assert_product(jax.jit(columns)(x, laid_out), x, w)

    parts = "one that was prepared inside jax.shard_map is multiplied inside jax.shard_map"
    with pytest.raises(ValueError, match=re.escape(parts) if isinstance(laid_out, PreparedMatrix) else "need 8 scales"):
        product(x, laid_out)

    part = lambda w: lay_out(dataclasses.replace(w, in_features=1024 // 8))  # noqa: E731
    laid_out = jax.jit(shard(part, in_specs=P("tensor"), out_specs=P("tensor")))(w)
    partial_sum = lambda x, w: jax.lax.psum(product(x, w), "tensor")  # noqa: E731
    rows = shard(partial_sum, in_specs=(P(None, "tensor"), P("tensor")), out_specs=P())
    assert_product(jax.jit(rows)(x, laid_out), x, w)


def run_partitioned_by_the_compiler() -> None:
    """No operand of weight size is gathered, with automatic and with explicit axes."""
    w, x = random_matrix(4, 1024, 256, 64), random_rows(8, 1024)
    for kind in (AUTO, EXPLICIT):
        mesh = jax.make_mesh((8,), ("tensor",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            place = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, P(*spec)))  # noqa: B023, E731
            x_placed = place(x)
            w_placed = jax.tree.map(lambda a: place(a, None, "tensor"), w)  # noqa: B023
            compiled = jax.jit(quantized_matmul).lower(x_placed, w_placed).compile()
            assert "all-gather" not in compiled.as_text()
            assert explain(x_placed, w_placed).backend == "xla"
            y = compiled(x_placed, w_placed)
            assert y.sharding.spec == P(None, "tensor")
            assert_product(y, x, w)


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name in sys.argv[1:]:
        if name.startswith("mosaic"):  # Pallas' interpreter knows no types of shard_map
            run_prepared(name, check_vma=False, interpret=True)
            continue
        for check in (True, False):
            run(name, check)
            run_prepared(name, check, interpret=False)
    run_partitioned_by_the_compiler()
    print("ok")
