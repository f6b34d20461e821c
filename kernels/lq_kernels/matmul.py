"""`quantized_matmul`: x @ w for a packed w, on whatever the program is compiled for.

The product is one JAX primitive. It stays whole in the traced program, and becomes a kernel only when the program is
lowered for a platform: the same traced function exports for a TPU from a laptop, and a CPU never traces a GPU kernel.
What serves it is `dispatch.choose`'s decision. The primitive is linear in x; scales and fractional zeros may be
differentiated too (through plain XLA), codes may not.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lq_kernels import devices, lowering
from lq_kernels.backend import Config, Matrix, PreparedMatrix
from lq_kernels.dispatch import choose, forced_backend, problem_of
from lq_kernels.packed import PackedMatrix, SegmentedMatrix, check_matrix
from lq_kernels.prepared import check_prepared, unprepared
from lq_kernels.registry import load_backend

X_DTYPES = ("bfloat16", "float16", "float32")


def quantized_matmul(
    x: Array,
    w: Matrix | Sequence[Matrix],
    *,
    backend: str | None = None,
    config: Config | None = None,
    out_dtype=None,
    interpret: bool = False,
) -> Any:
    """y = x @ w, w packed, without storing the unpacked matrix where a backend can avoid it.

    Args:
      x: activations `[..., K]`, bfloat16, float16 or float32. Any number of rows, none too.
      w: a `PackedMatrix`, a `SegmentedMatrix`, or what `prepare` made of one; no leading axes (use `jax.vmap`). A
        sequence of matrices that share the input, or several prepared as one, gives a tuple of products.
      backend: one of `backend_names()` to force it; None: the first that can, in the platform's order. The environment
        variable LQ_KERNELS_BACKEND forces one for the whole program.
      config: the backend's own configuration; None: the tuning table's, else its heuristics.
      out_dtype: dtype of the result, one of those of x; x's when None. Sums are float32 and rounded once.
      interpret: run a Pallas kernel in interpret mode, on any platform: True, or the interpreter's own parameters.
        Needs `backend`; for tests, and not differentiable.

    Returns:
      y `[..., N]`, an array; a tuple of such arrays for several matrices.

    Raises:
      ValueError: shapes or dtypes do not fit, or no backend has that name.
      NotImplementedError: the forced backend cannot serve this product; at the time the program is lowered.
    """
    if isinstance(w, Sequence):
        options = {"backend": backend, "config": config, "out_dtype": out_dtype, "interpret": interpret}
        return tuple(quantized_matmul(x, each, **options) for each in w)
    backend = backend or forced_backend()
    out_dtype = _check(x, w, backend, out_dtype, interpret)
    leaves, structure = jax.tree.flatten(w)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    params = {"structure": structure, "backend": backend, "config": config, "out_dtype": out_dtype}
    if interpret:  # inlined: an interpreter talks to the host, in order, which a primitive would have to declare
        y = lowering.program(**params, interpret=interpret)(rows, *leaves)
    else:
        y = matmul_p.bind(*_vary_alike([rows, *leaves]), **params)
    y = y.reshape(*x.shape[:-1], w.out_features)
    splits = getattr(w, "splits", None)
    return y if splits is None else tuple(jnp.split(y, _ends(splits), axis=-1))


def explain(
    x: Array | jax.ShapeDtypeStruct,
    w: Matrix | Sequence[Matrix],
    *,
    platform: str | None = None,
    device_kind: str | None = None,
    backend: str | None = None,
    config: Config | None = None,
    out_dtype=None,
    interpret: bool = False,
) -> Any:
    """Which backend `quantized_matmul(x, w)` takes, with what configuration, and why those before it refused.

    Args:
      x: `[..., K]`; only shape and dtype are looked at, and over how many devices it is spread, as for w: outside
        `shard_map` the compiler partitions such a product by itself.
      platform: "cpu", "cuda", "tpu" ...; that of the default device when None.
      device_kind: as `jax.Device.device_kind` says it ("TPU v5 lite", "NVIDIA H200"); that of the platform's first
        device when None, unknown where there is none.

    Returns:
      A `Choice`, to be printed; a tuple of them for a sequence of matrices.

    Raises as `quantized_matmul` does.
    """
    if isinstance(w, Sequence):
        where = {"platform": platform, "device_kind": device_kind, "backend": backend, "config": config}
        return tuple(explain(x, each, **where, out_dtype=out_dtype, interpret=interpret) for each in w)
    backend = backend or forced_backend()
    out_dtype = _check(x, w, backend, out_dtype, interpret)
    platform = devices.known_platform(platform)
    device_kind = device_kind or devices.device_kind(platform)
    concrete = [a for a in jax.tree.leaves((x, w)) if isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer)]
    spread = max((len(a.sharding.device_set) for a in concrete), default=1)
    problem = problem_of(math.prod(x.shape[:-1]), x.dtype, w, out_dtype, device_kind, spread)
    return choose(problem, platform, w, forced=backend, config=config, interpret=interpret)


def _check(x, w: Matrix, backend: str | None, out_dtype, interpret: bool) -> jnp.dtype:
    """Refuses what cannot be multiplied; returns the dtype of the result."""
    if isinstance(w, PreparedMatrix):
        check_prepared(w)
    elif isinstance(w, PackedMatrix | SegmentedMatrix):
        check_matrix(w)
    else:
        raise ValueError(f"w is a {type(w).__name__}; quantized_matmul takes a packed, segmented or prepared matrix")
    if x.ndim == 0 or x.shape[-1] != w.in_features:
        raise ValueError(
            f"x of shape {x.shape} for a matrix of {w.in_features} input channels: its last axis must be that"
        )
    if str(x.dtype) not in X_DTYPES:
        raise ValueError(f"x is {x.dtype}; quantized_matmul takes {', '.join(X_DTYPES)}")
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if str(out_dtype) not in X_DTYPES:
        raise ValueError(f"out_dtype is {out_dtype}; quantized_matmul gives {', '.join(X_DTYPES)}")
    if backend is not None:
        load_backend(backend)
    elif interpret:
        raise ValueError("interpret=True needs a backend to interpret; name it, as in backend='mosaic_tpu'")
    return out_dtype


def _ends(splits: tuple[int, ...]) -> list[int]:
    return [sum(splits[: i + 1]) for i in range(len(splits) - 1)]


def _vary_alike(operands: list[Array]) -> list[Array]:
    """Inside `shard_map` with its checks on: every operand typed as varying over all axes any of them varies over."""
    axes = [getattr(getattr(jax.typeof(a), "mat", None), "varying", frozenset()) for a in operands]
    union = frozenset().union(*axes)
    return [
        a if own == union else jax.lax.pcast(a, tuple(sorted(union - own, key=str)), to="varying")
        for a, own in zip(operands, axes, strict=True)
    ]


matmul_p = Primitive("quantized_matmul")


@functools.lru_cache(maxsize=512)
def _compiled(**params):
    return jax.jit(functools.partial(matmul_p.bind, **params))


matmul_p.def_impl(lambda *operands, **params: _compiled(**params)(*operands))


@matmul_p.def_abstract_eval
def _abstract_eval(x, *leaves, structure, out_dtype, **params):
    w = jax.tree.unflatten(structure, leaves)
    shape = (x.shape[0], w.out_features)
    if x.sharding.mesh.empty:
        return x.update(shape=shape, dtype=out_dtype, weak_type=False)
    # On explicit mesh axes the result is sharded as the rows of x and the output channels of w are.
    columns = None if isinstance(w, PreparedMatrix) else w.segments[0].scales.sharding.spec[-1]
    sharding = x.sharding.update(spec=jax.P(x.sharding.spec[0], columns))
    return x.update(shape=shape, dtype=out_dtype, weak_type=False, sharding=sharding)


def _batched(operands, dims, *, structure, **params):
    """Rows of a batch are rows; a batch of matrices is a loop over them."""
    x, *leaves = operands
    x_dim, *leaf_dims = dims
    bind = functools.partial(matmul_p.bind, structure=structure, **params)
    if all(d is None for d in leaf_dims):
        x = jnp.moveaxis(x, x_dim, 0)
        y = bind(x.reshape(-1, x.shape[-1]), *leaves)
        return y.reshape(*x.shape[:2], y.shape[-1]), 0
    mapped = [i for i, d in enumerate(dims) if d is not None]
    stacked = [jnp.moveaxis(operands[i], dims[i], 0) for i in mapped]

    def one(slices):
        whole = list(operands)
        for i, a in zip(mapped, slices, strict=True):
            whole[i] = a
        return bind(*whole)

    return jax.lax.map(one, stacked), 0


batching.primitive_batchers[matmul_p] = _batched


def _jvp(primals, tangents, *, structure, out_dtype, **params):
    x, *leaves = primals
    x_dot, *leaf_dots = tangents
    y = matmul_p.bind(x, *leaves, structure=structure, out_dtype=out_dtype, **params)
    y_dot = ad.Zero(jax.typeof(y).to_tangent_aval())
    if not isinstance(x_dot, ad.Zero):
        y_dot = matmul_p.bind(x_dot, *leaves, structure=structure, out_dtype=out_dtype, **params)
    moving = [i for i, dot in enumerate(leaf_dots) if not isinstance(dot, ad.Zero)]
    if moving:

        def of_moving(values):
            whole = list(leaves)
            for i, value in zip(moving, values, strict=True):
                whole[i] = value
            return _unpacked_product(x, jax.tree.unflatten(structure, whole), out_dtype)

        _, part = jax.jvp(of_moving, ([leaves[i] for i in moving],), ([leaf_dots[i] for i in moving],))
        y_dot = part if isinstance(y_dot, ad.Zero) else y_dot + part
    return y, y_dot


def _transpose(y_bar, x, *leaves, structure, out_dtype, **params):
    """x_bar = y_bar @ w^T, on the unpacked matrix: what training a part of a model around packed weights needs."""
    if isinstance(y_bar, ad.Zero):
        return (ad.Zero(x.aval), *[None] * len(leaves))
    w = unprepared(jax.tree.unflatten(structure, leaves))
    dense = w.dequantize(x.aval.dtype)
    x_bar = jnp.matmul(
        y_bar.astype(dense.dtype),
        dense.T,
        precision=jax.lax.Precision.HIGHEST if dense.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        out_sharding=None if x.aval.sharding.mesh.empty else x.aval.sharding,
    )
    return (x_bar.astype(x.aval.dtype), *[None] * len(leaves))


def _unpacked_product(x: Array, w: Matrix, out_dtype) -> Array:
    y = jnp.matmul(x.astype(jnp.float32), unprepared(w).dequantize(), precision=jax.lax.Precision.HIGHEST)
    return y.astype(out_dtype)


ad.primitive_jvps[matmul_p] = _jvp
ad.primitive_transposes[matmul_p] = _transpose
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(matmul_p, lowering.rule(_platform), platform=_platform)
mlir.register_lowering(matmul_p, lowering.rule("other"))
