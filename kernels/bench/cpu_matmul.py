"""Times the CPU kernels beside XLA's dots.

    python kernels/bench/cpu_matmul.py --out kernels/bench/results/cpu_<name>.json

A program is a chain of eight products with different matrices (each adds a scalar of the one before to x), so that
nothing runs at the same time; it is called with one set of eight after the other, so that the weights come from memory:
all sets together have `--megabytes`, more than the caches hold. A sample is the time of one pass over all sets, by the
number of products; from 16 rows on, where arithmetic takes the time, over the first two sets. All contenders of a row
are timed in turns, one sample each, so that the ratios are of the same minutes; so is what one thread reads of as many
arrays of JAX. Minimum, median and quartiles are kept. On a machine that others use too, read ratios and minima.
"""

import argparse
import ctypes
import dataclasses
import datetime
import functools
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from lq_kernels import cpu
from lq_kernels.backend import PreparedMatrix
from lq_kernels.cpu import BACKEND, CpuConfig, building
from lq_kernels.cpu.library import library
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import plane_widths
from lq_kernels.xla_scan import scan_matmul

GROUP = 128
SHAPES = ((4096, 4096), (4096, 14336), (2048, 8192))


CHAIN = 8


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    x_dtype: str
    megabytes: float  # of one matrix
    run: object  # (x, CHAIN matrices) -> x, y; jitted
    matrix: str  # which of `matrices` it multiplies


def chain(product):
    """Products one after the other, each waiting for the one before."""

    def run(x, matrices):
        for w in matrices:
            y = product(x, w)
            x = x.at[0, 0].add((1e-30 * y[0, 0]).astype(x.dtype))
        return x, y

    return jax.jit(run)


def random_words(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32))


def packed(bits, K, N, seed) -> PackedMatrix:
    """Random codes, bfloat16 scales, a constant zero point: what a symmetric checkpoint has."""
    return PackedMatrix(
        planes=tuple(random_words((seed, p), (K * p // 32, N)) for p in plane_widths(bits)),
        scales=jnp.full((K // GROUP, N), 0.02, jnp.bfloat16),
        zeros=None,
        zero_point=2.0 ** (bits - 1),
        bits=bits,
        group_size=GROUP,
        in_features=K,
    )


def prepared(bits, K, N, seed) -> PreparedMatrix:
    arrays = BACKEND.prepare((packed(bits, K, N, seed),), "blocked")
    return PreparedMatrix(
        arrays=arrays, permutation=None, backend="cpu", target="blocked", segments=(), in_features=K, out_features=N
    )


def first_matrices(K, N, widths) -> dict:
    """One matrix of each kind, by name. Their numbers do not matter to the time."""
    dense = {str(d): jnp.full((K, N), 0.01, d) for d in ("float32", "bfloat16")}
    return dense | {"scan": packed(4, K, N, 0)} | {f"{b} bits": prepared(b, K, N, b) for b in widths}


def contenders(K, N, widths, threads):
    def dense(dtype):
        product = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32)  # noqa: E731
        return Contender(f"XLA dot {dtype}", dtype, K * N * jnp.dtype(dtype).itemsize / 1e6, chain(product), dtype)

    yield dense("float32")
    yield dense("bfloat16")
    scan = chain(lambda x, w: scan_matmul(x, w, jnp.float32, 512))
    yield Contender("xla_scan 4 bits", "float32", K * N / 2e6, scan, "scan")
    for bits in widths:
        megabytes = (K * N * bits / 8 + K // GROUP * N * 2) / 1e6
        for dtype in ("float32", "bfloat16"):
            for count in threads:
                name = f"cpu {bits} bits" + ("" if count == 1 else f", threads={count}")
                run = chain(functools.partial(BACKEND.matmul, out_dtype=jnp.float32, config=CpuConfig(threads=count)))
                yield Contender(name, dtype, megabytes, run, f"{bits} bits")


def reader(megabytes):
    """A function that reads 8 MB arrays of JAX, one after the other, and returns the GB/s of one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "read.so"
        source = Path(__file__).with_name("read.cc")
        subprocess.run([*building.compiler(), "-O3", "-fPIC", "-shared", str(source), "-o", str(file)], check=True)
        function = ctypes.CDLL(str(file)).read_all
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    arrays = [np.asarray(jnp.full(1 << 21, seed, jnp.int32)) for seed in range(int(megabytes / 8.4))]

    def read() -> float:
        seconds = timed(lambda: [function(a.ctypes.data, a.nbytes // 8) for a in arrays])
        return sum(a.nbytes for a in arrays) / seconds / 1e9

    return read


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def sets_of(matrix, megabytes) -> list:
    """Copies of a matrix that together have `megabytes`, in sets of CHAIN."""
    each = sum(leaf.nbytes for leaf in jax.tree.leaves(matrix)) / 1e6
    return [[jax.tree.map(jnp.copy, matrix) for _ in range(CHAIN)] for _ in range(math.ceil(megabytes / each / CHAIN))]


def sample(contender, x, sets) -> float:
    """Seconds of one product."""

    def run():
        current = x
        for matrices in sets:
            current, y = contender.run(current, matrices)
        y.block_until_ready()

    return timed(run) / (CHAIN * len(sets))


def measure(K, N, rows, ready, matrices, read, samples) -> tuple[float, list[dict]]:
    taken = {name: sets if rows < 16 else sets[:2] for name, sets in matrices.items()}
    times = {}
    for c in ready:
        x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, K)), c.x_dtype)
        sample(c, x, taken[c.matrix][:1])  # compiles
        times[c] = (x, [])
    reads = []
    for _ in range(samples):
        reads.append(read())
        for c, (x, list_) in times.items():
            list_.append(sample(c, x, taken[c.matrix]))
    results = [result(c, K, N, rows, list_, CHAIN * len(taken[c.matrix])) for c, (_, list_) in times.items()]
    dense = {r["contender"]: r for r in results}
    for r in results:
        r["times_faster_than_f32_dot"] = dense["XLA dot float32"]["min_ms"] / r["min_ms"]
        r["times_faster_than_bf16_dot"] = dense["XLA dot bfloat16"]["min_ms"] / r["min_ms"]
    return max(reads), results


def result(c, K, N, rows, times, count) -> dict:
    quarters = statistics.quantiles(times, n=4)
    return {
        "contender": c.name,
        "x": c.x_dtype,
        "K": K,
        "N": N,
        "M": rows,
        "matrices": count,
        "min_ms": min(times) * 1e3,
        "median_ms": statistics.median(times) * 1e3,
        "iqr_ms": (quarters[2] - quarters[0]) * 1e3,
        "gb_per_s": c.megabytes / 1e3 / min(times),
        "gflops": 2 * rows * K * N / min(times) / 1e9,
    }


def show(results, gb_per_s) -> None:
    for r in results:
        print(
            f"{r['K']:5} x {r['N']:5}  M {r['M']:<4} {r['contender']:24} {r['x']:9} {r['min_ms']:9.3f} ms "
            f"(median {r['median_ms']:8.3f}, IQR {r['iqr_ms']:7.3f}) {r['gb_per_s']:6.2f} GB/s "
            f"{r['gb_per_s'] / gb_per_s:5.2f} of read {r['gflops']:7.1f} GFLOP/s "
            f"{r['times_faster_than_f32_dot']:6.2f}x f32 dot {r['times_faster_than_bf16_dot']:6.2f}x bf16 dot",
            flush=True,
        )


def machine() -> dict:
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "kernels": cpu.status(),
        "supported": library().supported,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": _lines("/proc/loadavg"),
    }


def _lines(path) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--shapes", nargs="+", default=[f"{K}x{N}" for K, N in SHAPES], help="KxN")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="0: all")
    parser.add_argument("--megabytes", type=float, default=600)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record = {"machine": machine(), "megabytes": arguments.megabytes, "samples": arguments.samples, "runs": []}
    read = reader(arguments.megabytes)
    for shape in arguments.shapes:
        K, N = map(int, shape.split("x"))
        matrices = {n: sets_of(m, arguments.megabytes) for n, m in first_matrices(K, N, arguments.bits).items()}
        ready = list(contenders(K, N, arguments.bits, arguments.threads))
        for rows in arguments.rows:
            gb_per_s, results = measure(K, N, rows, ready, matrices, read, arguments.samples)
            record["runs"].append({"read_gb_per_s": gb_per_s, "results": results})
            print(f"one thread reads {gb_per_s:.2f} GB/s")
            show(results, gb_per_s)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
