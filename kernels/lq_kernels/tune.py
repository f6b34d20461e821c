"""`python -m lq_kernels.tune`: times every candidate configuration on this machine's device and writes the table.

    python -m lq_kernels.tune --shapes 4096x4096,4096x14336 --bits 2,3,4,8 --rows 1,16,64 --out tables/

Candidates are compiled in threads and timed one after the other. One that cannot be compiled or run is kept, with its
reason, so that "all failed" can be explained. The table is merged into what is there, problem by problem, and written
whole; `lq_kernels/tables/` is where shipped ones live, LQ_KERNELS_TABLES names a folder of your own.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lq_kernels import tuning
from lq_kernels.backend import Backend, Config, Problem
from lq_kernels.devices import default_platform, device_kind
from lq_kernels.dispatch import problem_of
from lq_kernels.matmul import explain, quantized_matmul
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import plane_widths, words_along
from lq_kernels.prepared import prepare
from lq_kernels.registry import backend_names, load_backend
from lq_kernels.timing import Timing, compile_chains, copies_to_leave_cache, time_chains


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one candidate: a timing, or the reason why there is none."""

    config: Config
    timing: Timing | None
    failure: str | None = None


def random_packed(bits: int, K: int, N: int, group: int, *, asymmetric: bool = True, seed: int = 0) -> PackedMatrix:
    """Random words, scales and zero points: for timing, the codes' values do not matter, but zeros would run faster."""
    rng = np.random.default_rng(seed)
    groups = -(-K // group)
    words = [rng.integers(0, 2**32, (words_along(K, p), N), np.uint32) for p in plane_widths(bits)]
    return PackedMatrix(
        planes=tuple(jnp.asarray(w) for w in words),
        scales=jnp.asarray(rng.uniform(0.01, 0.03, (groups, N)), jnp.bfloat16),
        zeros=jnp.asarray(rng.integers(0, 2**bits, (groups, N), np.uint32)) if asymmetric else None,
        zero_point=float(2 ** (bits - 1)),
        bits=bits,
        group_size=group,
        in_features=K,
    )


def tune(
    backend: Backend,
    w: PackedMatrix,
    rows: int,
    *,
    x_dtype=jnp.bfloat16,
    cache_bytes: int = 64 << 20,
    repeats: int = 10,
    workers: int = 4,
    deadline: float = float("inf"),
    limit: int | None = None,
    interpret: bool = False,
) -> tuple[Problem, list[Outcome]]:
    """Times the candidates of one product.

    Args:
      backend: whose candidates.
      w: the matrix; timed over as many copies as leave `cache_bytes` of cache behind.
      rows: M.
      workers: threads that compile.
      deadline: `time.monotonic()` after which what is left is given up, with that reason.
      limit: how many candidates at most, from the first; all when None.

    Returns:
      The problem, and an `Outcome` for every candidate, fastest first, failures last.
    """
    platform = default_platform()
    problem = problem_of(rows, jnp.dtype(x_dtype), w, jnp.dtype(x_dtype), device_kind(platform))
    prepared = prepare(w, backend=backend.name)
    copies = copies_to_leave_cache(prepared.nbytes, cache_bytes)
    matrices = [prepared, *[jax.tree.map(lambda a: a + 0, prepared) for _ in range(copies - 1)]]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, w.in_features)), x_dtype)
    candidates = backend.candidates(problem, backend.target(problem.device_kind))[:limit]

    def build(config):
        if time.monotonic() > deadline:
            raise TimeoutError("no time left to compile it")
        product = lambda x, w: quantized_matmul(x, w, backend=backend.name, config=config, interpret=interpret)  # noqa: E731
        return compile_chains(product, x, matrices)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        programs = [pool.submit(build, config) for config in candidates]
        outcomes = [
            _run(config, program, x, matrices, repeats, deadline)
            for config, program in zip(candidates, programs, strict=True)
        ]
    return problem, sorted(outcomes, key=lambda o: o.timing.program if o.timing else float("inf"))


def _run(config, program, x, matrices, repeats, deadline) -> Outcome:
    try:
        chains = program.result()
        if time.monotonic() > deadline:
            return Outcome(config, None, "no time left to run it")
        return Outcome(config, time_chains(chains, x, matrices, repeats))
    except Exception as problem:  # a compiler may refuse in any way it likes; the reason is kept
        return Outcome(
            config, None, f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        )


def write_entry(folder: Path, backend: Backend, problem: Problem, config: Config) -> Path:
    """Puts one problem's configuration into the device's table, whatever else is there staying. Returns the file."""
    file = folder / tuning.file_name(problem.device_kind or "unknown")
    entries = tuning.read_entries(file) if file.exists() else {}
    mine = entries.get(backend.name, {}) | {tuning.key(problem): dataclasses.asdict(config)}
    entries[backend.name] = dict(sorted(mine.items()))
    table = {"device_kind": problem.device_kind, "versions": {"jax": jax.__version__}, "entries": entries}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
    return file


def count(text: str) -> int:
    """ "16" -> 16"""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}; write a whole number")
    return int(text)


def at_least(least: int):
    def number(text: str) -> int:
        if count(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; write {least} or more")
        return count(text)

    return number


def writable(text: str) -> Path:
    """A folder that is there, made when it is not: refused before any work."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise argparse.ArgumentTypeError(f"{text}: {reason.strerror}; write a folder that can be made") from None
    return Path(text)


def numbers(text: str) -> list[int]:
    """ "1,16" -> [1, 16]"""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; write whole numbers with commas between them, as in 1,16")
    return [int(part) for part in text.split(",")]


def widths(text: str) -> list[int]:
    """ "2,4" -> [2, 4]"""
    if beyond := [bits for bits in numbers(text) if bits > 8]:
        raise argparse.ArgumentTypeError(f"{beyond[0]} bits; a code has 1 to 8")
    return numbers(text)


def shapes(text: str) -> list[tuple[int, int]]:
    """ "4096x14336,4096x4096" -> [(4096, 14336), (4096, 4096)]"""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; write KxN, several with commas, as in 4096x4096,4096x14336")
    return [(int(K), int(N)) for K, N in (part.split("x") for part in text.split(","))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lq_kernels.tune", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backend", choices=backend_names(), help="default: the first of this platform that can")
    parser.add_argument("--shapes", type=shapes, default=[(4096, 4096)], help="KxN, several with commas")
    parser.add_argument("--bits", type=widths, default=[4])
    parser.add_argument("--rows", type=numbers, default=[1, 16])
    parser.add_argument("--group", type=at_least(1), default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--cache-mb", type=count, default=64, help="cache that a chain of matrices must leave behind")
    parser.add_argument("--repeats", type=at_least(2), default=10)
    parser.add_argument("--out", type=writable, default=tuning.SHIPPED, help="folder of the tables")
    options = parser.parse_args(arguments)
    failed = 0
    for K, N in options.shapes:
        for bits in options.bits:
            w = random_packed(bits, K, N, options.group, asymmetric=not options.symmetric)
            for rows in options.rows:
                try:
                    x = jax.ShapeDtypeStruct((rows, K), jnp.dtype(options.dtype))
                    name = explain(x, w, backend=options.backend).backend
                    failed += not _tune_one(load_backend(name), w, rows, options)
                except (NotImplementedError, ValueError) as reason:  # not such a matrix, not here; a broken table
                    parser.error(str(reason))
    return 1 if failed else 0


def _said(outcome: Outcome) -> str:
    if (t := outcome.timing) is None:
        return str(outcome.failure)
    return f"{t.median:9.1f} us (min {t.minimum:.1f})" if t.median > 0 else "lost in noise"


def _tune_one(backend: Backend, w: PackedMatrix, rows: int, options) -> bool:
    """Tunes, prints and writes one problem; False when no candidate ran."""
    settings = {"cache_bytes": options.cache_mb << 20, "repeats": options.repeats}
    problem, outcomes = tune(backend, w, rows, x_dtype=jnp.dtype(options.dtype), **settings)
    print(f"{backend.name}  {tuning.key(problem)}")
    for outcome in outcomes:
        print(f"  {_said(outcome)}", outcome.config)
    if outcomes[0].timing is None:
        print(f"tune: no candidate of {backend.name} ran; nothing is written for this problem", file=sys.stderr)
        return False
    print(f"  -> {write_entry(options.out, backend, problem, outcomes[0].config)}")
    return True


if __name__ == "__main__":
    sys.exit(main())
