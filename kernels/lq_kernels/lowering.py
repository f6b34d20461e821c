"""From the primitive to a backend's program, for one platform, when JAX lowers for it."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.interpreters import mlir

from lq_kernels.backend import PreparedMatrix
from lq_kernels.devices import default_platform, device_kind
from lq_kernels.dispatch import choose, problem_of
from lq_kernels.prepared import lay_out, unprepared
from lq_kernels.registry import load_backend

ACCELERATORS = ("cuda", "tpu")
logger = logging.getLogger("lq_kernels")


def rule(platform: str):
    """The lowering rule for `mlir.register_lowering`."""

    def lower(ctx, *operands, **params):
        run = _jitted(platform=platform, kind=device_kind(platform), devices=_automatic_devices(ctx), **params)
        plain = ctx.replace(avals_in=_untyped(ctx.avals_in), avals_out=_untyped(ctx.avals_out))
        return mlir.lower_fun(run, multiple_results=False)(plain, *operands)

    return lower


@functools.lru_cache(maxsize=512)
def _jitted(**params):
    """Equal products share it: traced once, one function in the program."""
    return jax.jit(program(**params, interpret=False))


def program(*, structure, backend, config, out_dtype, interpret, platform=None, kind=None, devices=1):
    """The function of x `[M, K]` and the matrix' leaves that the chosen backend makes, for one platform.

    `platform` and `kind` are the default device's when None.
    """
    platform = platform or default_platform()
    kind = kind or device_kind(platform)

    def quantized_matmul(x, *leaves):
        w = jax.tree.unflatten(structure, leaves)
        if 0 in (x.shape[0], w.in_features, w.out_features):
            return jnp.zeros((x.shape[0], w.out_features), out_dtype)
        problem = problem_of(x.shape[0], x.dtype, w, out_dtype, kind, devices)
        choice = choose(problem, platform, w, forced=backend, config=config, interpret=interpret)
        if platform in ACCELERATORS and choice.refusals:
            _announce(choice.backend, problem.device_kind or platform, tuple(choice.refusals.items()))
        chosen = load_backend(choice.backend)
        if w.permutation is not None:
            # The barrier keeps XLA from folding the gather's layout into a dot: its CPU has no bfloat16 dot for that.
            x = jax.lax.optimization_barrier(jnp.take(x, w.permutation, axis=1, mode="clip"))
        if not (isinstance(w, PreparedMatrix) and w.backend == chosen.name):
            w = lay_out(unprepared(w), chosen, chosen.target_in_call(kind))
        return chosen.matmul(x, w, out_dtype=out_dtype, config=choice.config, interpret=interpret)

    return quantized_matmul


@functools.lru_cache(maxsize=64)
def _announce(backend: str, device: str, refusals: tuple[tuple[str, str], ...]) -> None:
    """Says once for each reason that an accelerator goes without its own kernel."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    logger.warning("packed products on %s go through %s (%s)", device, backend, reasons)


def _untyped(avals) -> list:
    """Without the types of `shard_map`: one device's program is just a program to a kernel. Explicit axes stay."""
    explicit = jax.sharding.AxisType.Explicit
    return [a if explicit in a.sharding.mesh.axis_types else ShapedArray(a.shape, a.dtype) for a in avals]


def _automatic_devices(ctx) -> int:
    """Over how many devices the compiler will partition this program by itself; shard_map's axes do not count."""
    context = ctx.module_context.axis_context
    if hasattr(context, "num_devices"):
        return context.num_devices or 1
    mesh, manual = getattr(context, "mesh", None), getattr(context, "manual_axes", frozenset())
    count = 1
    for name, size in mesh.shape.items() if mesh is not None else ():
        count *= 1 if name in manual else size
    return count
