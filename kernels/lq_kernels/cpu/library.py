"""The shared library: found, loaded, and made known to XLA, once per process. Absent, it says why."""

import ctypes
import dataclasses
import functools
import os

import jax

from lq_kernels.cpu import building

TARGET = "lq_quantized_matmul"


@dataclasses.dataclass(frozen=True)
class Library:
    """What is loaded, or why nothing is."""

    reason: str | None  # one line; None when the library is there
    compiled: tuple[str, ...] = ()  # instruction sets in it, best first
    supported: tuple[str, ...] = ()  # those that this processor has
    path: str = ""


@functools.cache
def library() -> Library:
    path = building.find()
    if path is None:
        cause = (
            "no C++ compiler when it was installed" if building.compiler() is None else "the C++ kernels are not built"
        )
        return Library(f"{cause}; run python -m lq_kernels.cpu.build")
    try:
        loaded = ctypes.CDLL(os.fspath(path))
        loaded.lq_instruction_sets.restype = ctypes.c_char_p
        compiled, supported = (tuple(loaded.lq_instruction_sets(flag).decode().split()) for flag in (0, 1))
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(getattr(loaded, TARGET)), platform="cpu")
    except Exception as error:  # a foreign or broken file must not break the import of the package
        return Library(f"{path} cannot be loaded ({error}); run python -m lq_kernels.cpu.build --force")
    return Library(None, compiled, supported, os.fspath(path))


def status() -> str:
    """One line: the instruction sets compiled in and the one taken, or why there is none."""
    found = library()
    if found.reason:
        return f"absent: {found.reason}"
    return f"{found.supported[0]} (compiled in: {', '.join(found.compiled)})"
