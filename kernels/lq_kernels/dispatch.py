"""Which backend serves a product, and why the others don't: the one place where that is decided.

The decision is a pure function of a `Problem` and a platform. `quantized_matmul` takes it when a program is lowered,
`explain` prints it, the tests enumerate it.
"""

import dataclasses
import os

import jax.numpy as jnp

from lq_kernels import tuning
from lq_kernels.backend import Backend, Config, Matrix, PreparedMatrix, Problem, segment_of
from lq_kernels.registry import automatic, load_backend

FORCE = "LQ_KERNELS_BACKEND"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What serves a product on one platform. `str()` is the answer of `explain`."""

    platform: str
    problem: Problem
    backend: str
    config: Config
    config_from: str  # "caller", "table" or "heuristics"
    note: str | None  # what a user could do better, in one line
    refusals: dict[str, str]  # backend -> reason, those asked before the one taken

    def __str__(self) -> str:
        p = self.problem
        widths = "+".join(str(s.bits) for s in p.segments)
        lines = [
            f"{self.backend}: [{p.rows}, {p.in_features}] @ [{p.in_features}, {p.out_features}] at {widths} bits, "
            f"{p.x_dtype} -> {p.out_dtype}, on {p.device_kind or self.platform}",
            f"  {self.config} (from {self.config_from})",
        ]
        lines += [f"  note: {self.note}"] if self.note else []
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def forced_backend() -> str | None:
    """The backend named by the environment variable LQ_KERNELS_BACKEND, or None. Raises ValueError for no known name.

    It is read whenever a product is traced: set it before the program starts.
    """
    name = os.environ.get(FORCE) or None
    if name is not None:
        try:
            load_backend(name)
        except ValueError as problem:
            raise ValueError(f"{FORCE}: {problem}") from None
    return name


def problem_of(rows: int, x_dtype, w: Matrix, out_dtype, device_kind: str | None, devices: int = 1) -> Problem:
    segments = w.segments if isinstance(w, PreparedMatrix) else tuple(segment_of(s) for s in w.segments)
    return Problem(
        rows=rows,
        in_features=w.in_features,
        out_features=w.out_features,
        x_dtype=str(jnp.dtype(x_dtype)),
        out_dtype=str(jnp.dtype(out_dtype)),
        segments=segments,
        device_kind=device_kind,
        devices=devices,
    )


def choose(
    problem: Problem,
    platform: str,
    w: Matrix,
    *,
    forced: str | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Choice:
    """The first backend that can, in the platform's order; `forced` alone when it is given.

    Raises NotImplementedError with every reason when none can.
    """
    refusals: dict[str, str] = {}
    for name in automatic(platform) if forced is None else (forced,):
        backend = load_backend(name)
        meant = forced is not None or (isinstance(w, PreparedMatrix) and w.backend == name)
        if problem.device_kind is None and meant:
            problem = dataclasses.replace(problem, device_kind=backend.assumes)
        reason = _why_not(backend, problem, platform, config, interpret)
        if reason is None and forced is None:
            reason = backend.declines(problem)
        if reason is None:
            config, source = _config(backend, problem, platform, w, config)
            return Choice(platform, problem, name, config, source, _note(backend, problem, w), refusals)
        refusals[name] = reason
    raise NotImplementedError("; ".join(f"{name}: {reason}" for name, reason in refusals.items()))


def layout_target(backend: Backend, w: Matrix, device_kind: str | None) -> str:
    """The layout in which `backend` gets `w`: the one it was prepared in, or the one made in the call."""
    if isinstance(w, PreparedMatrix) and w.backend == backend.name:
        return w.target
    return backend.target_in_call(device_kind)


def _why_not(backend: Backend, problem: Problem, platform: str, config, interpret: bool) -> str | None:
    if backend.platforms and platform not in backend.platforms and not interpret:
        return f"runs on {', '.join(backend.platforms)}, not on {platform}"
    if config is not None and not isinstance(config, backend.config_type):
        return f"takes a {backend.config_type.__name__}, not a {type(config).__name__}"
    if not (isinstance(problem.rows, int) or backend.symbolic_rows):
        return f"the number of rows is symbolic ({problem.rows}); a kernel is made for a number"
    if problem.devices > 1 and not backend.partitionable:
        return f"the compiler would gather the operands whole to run it on {problem.devices} devices; use jax.shard_map"
    return backend.refuses(problem)


def _config(backend: Backend, problem: Problem, platform: str, w: Matrix, config) -> tuple[Config, str]:
    if config is not None:
        return config, "caller"
    if (tuned := tuning.lookup(backend, problem)) is not None:
        return tuned, "table"
    return backend.default_config(problem, layout_target(backend, w, problem.device_kind)), "heuristics"


def _note(backend: Backend, problem: Problem, w: Matrix) -> str | None:
    if isinstance(w, PreparedMatrix):
        if w.backend != backend.name:
            return f"the matrix was prepared for {w.backend}; its layout is undone in every call"
        return None
    if backend.target_in_call(problem.device_kind) != "canonical":
        return f"the matrix is laid out for {backend.name} in every call; lq_kernels.prepare does it once"
    return None
