"""Products on the real device against float64: what interpretation cannot show.

Every case is a matrix, a number of rows and a dtype; the reference is computed on the host in NumPy. The worst error is
reported in units of the bound: 4e-6 of |x| @ |w|, and half a unit of the last place of the result's dtype.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lq_kernels import SegmentedMatrix, prepare, quantized_matmul
from lq_kernels.reference import error_scale, reference_matmul
from lq_kernels.tune import random_packed


@dataclasses.dataclass(frozen=True)
class Case:
    bits: tuple[int, ...]  # of each segment
    lengths: tuple[int, ...]
    N: int
    group: int
    asymmetric: bool
    rows: int
    dtype: str = "bfloat16"

    def matrix(self, seed: int) -> SegmentedMatrix:
        options = {"asymmetric": self.asymmetric, "seed": seed}
        parts = [
            random_packed(b, k, self.N, min(self.group, k), **options)
            for b, k in zip(self.bits, self.lengths, strict=True)
        ]
        order = np.random.default_rng(seed).permutation(sum(self.lengths)).astype(np.int32)
        return SegmentedMatrix(segments=tuple(parts), permutation=jnp.asarray(order))


def cases(small: bool = False) -> list[Case]:
    """Every width with every number of rows, then what is special: groups, ragged shapes, segments, other dtypes."""
    if small:
        return [Case((2, 3), (128, 128), 128, 64, True, 3)]
    rows = (1, 2, 7, 8, 9, 16, 17, 33, 64, 127, 128, 257)
    found = [Case((bits,), (1024,), 512, 128, bits % 2 == 0, m) for bits in range(1, 9) for m in rows]
    found += [Case((bits,), (1024,), 256, group, True, 5) for bits in (2, 3, 4, 8) for group in (32, 64, 256, 1024)]
    found += [Case((b,), (k,), n, 128, True, 4) for b in (3, 4) for k, n in ((512, 100), (1000, 130), (96, 64))]
    found += [Case((2, 3, 4, 8), (512, 256, 128, 128), 384, 128, True, m) for m in (1, 16, 200)]
    found += [Case((b,), (1024,), 256, 128, True, 6, dtype) for b in (2, 4) for dtype in ("float32", "float16")]
    return [*found, Case((4,), (4096,), 1000, 128, True, 16), Case((3,), (11008,), 4096, 128, True, 1)]


def worst_error(case: Case, backend: str, *, interpret: bool = False, seed: int = 0) -> float:
    """In units of the bound; NaN anywhere counts as infinite."""
    w = case.matrix(seed)
    x = jnp.asarray(np.random.default_rng(seed + 1).standard_normal((case.rows, w.in_features)), case.dtype)
    prepared = prepare(w, backend=backend)
    product = jax.jit(lambda x, w: quantized_matmul(x, w, backend=backend, interpret=interpret))
    y = np.asarray(product(x, prepared))
    want = reference_matmul(x, w)
    bound = 4e-6 * error_scale(x, w) + 1e-30
    if y.dtype != np.float32:
        bound = bound + 0.51 * float(ml_dtypes.finfo(y.dtype).eps) * (np.abs(want) + bound)
    worst = np.max(np.abs(y.astype(np.float64) - want) / bound)
    return float(worst) if np.isfinite(worst) else float("inf")


def check(backend: str, *, small: bool = False, interpret: bool = False, deadline: float = float("inf")) -> dict:
    """Runs the cases in order until `deadline` (`time.monotonic()`).

    Returns counts, the worst error, and every failure with its reason; `left` cases were not run.
    """
    todo, failures, worst, done = cases(small), [], 0.0, 0
    for case in todo:
        if time.monotonic() > deadline:
            break
        done += 1
        try:
            error = worst_error(case, backend, interpret=interpret)
        except Exception as problem:  # whatever the compiler or the driver says belongs in the report
            failures.append({"case": dataclasses.asdict(case), "problem": f"{type(problem).__name__}: {problem}"[:500]})
            continue
        worst = max(worst, error)
        if error > 1.0:
            failures.append({"case": dataclasses.asdict(case), "error_over_bound": error})
    return {"run": done, "left": len(todo) - done, "worst_over_bound": worst, "failures": failures}
