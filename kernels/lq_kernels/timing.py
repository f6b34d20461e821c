"""How long one product takes on the device, launch and dispatch overhead taken out.

One compiled program runs a chain of products, each of which waits for the one before, over as many different matrices
as it takes to leave the caches behind; another runs the chain twice. Their difference is the products' time alone: what
starting a program costs is in both.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds for one product."""

    median: float  # of the longer program less that of the shorter
    minimum: float  # the same of the fastest runs
    quartiles: float  # between the first and the third quartile of the longer program
    repeats: int
    program: float  # median of the whole longer program: candidates are ranked by it, as differences may drown in noise


def chain(product: Callable[[Array, Any], Array], x: Array, matrices: Sequence[Any]) -> list[Array]:
    """Products of x with each matrix, in order: the barrier holds each one's x back until the one before is done."""
    products = []
    for w in matrices:
        y = product(x, w)
        x, y = lax.optimization_barrier((x, y))
        products.append(y)
    return products


def compile_chains(product: Callable, x: Array, matrices: Sequence[Any]) -> tuple[Any, Any]:
    """The programs that `time_chains` runs: once and twice over the matrices. May be called from several threads."""
    once = jax.jit(lambda x, ws: chain(product, x, ws)).lower(x, matrices).compile()
    twice = jax.jit(lambda x, ws: chain(product, x, [*ws, *ws])).lower(x, matrices).compile()
    return once, twice


def time_chains(chains: tuple[Any, Any], x: Array, matrices: Sequence[Any], repeats: int = 20) -> Timing:
    """Runs both programs in turn, `repeats` times each (two at least), after one run of each that is not counted."""
    seconds = {program: [] for program in chains}
    for _ in range(repeats + 1):
        for program, taken in seconds.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, matrices))
            taken.append(time.perf_counter() - start)
    once, twice = (taken[1:] for taken in seconds.values())
    first, _, third = statistics.quantiles(twice, n=4)
    per_product = 1e6 / len(matrices)
    return Timing(
        median=(statistics.median(twice) - statistics.median(once)) * per_product,
        minimum=(min(twice) - min(once)) * per_product,
        quartiles=(third - first) / 2 * per_product,
        repeats=repeats,
        program=statistics.median(twice) * 1e6,
    )


def copies_to_leave_cache(nbytes: int, cache_bytes: int, at_least: int = 2, at_most: int = 64) -> int:
    """How many matrices of `nbytes` a chain needs so that each is read from memory: four caches' worth."""
    return max(at_least, min(at_most, -(-4 * cache_bytes // max(nbytes, 1))))
