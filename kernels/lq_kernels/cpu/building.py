"""Builds the C++ of this package into one shared library; `python -m lq_kernels.cpu.build` calls it.

The standard library is all that is imported, so that the build hook can run this file in an empty environment. The
library needs neither Python's headers nor jaxlib's: it is loaded through ctypes, and XLA's C interface is one header
that is kept with the sources. One library therefore serves every Python and every JAX from the floor on.

Its name holds a digest of the sources: a library of other sources is never loaded, and several checkouts or
installations do not disturb each other. Environment: `CXX` names the compiler, `CXXFLAGS` is appended to the flags.
"""

import argparse
import dataclasses
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "src"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One file for one instruction set, with the flags that allow its intrinsics."""

    name: str
    machines: tuple[str, ...]
    flags: tuple[str, ...]


_X86 = ("x86_64", "amd64")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
UNITS = (
    Unit("amx", _X86, (*_AVX512, "-mamx-tile", "-mamx-bf16")),
    Unit("avx512_vnni", _X86, (*_AVX512, "-mavx512vnni", "-mavx512vbmi")),
    Unit("avx512", _X86, _AVX512),
    Unit("avx2", _X86, ("-mavx2", "-mfma")),
    Unit("neon", ("aarch64", "arm64"), ()),
)


class BuildError(RuntimeError):
    """No compiler, or none that can build the sources."""


def compiler() -> list[str] | None:
    """The C++ compiler as a command: `CXX`, or the first of c++, g++ and clang++ that is found."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def library_name() -> str:
    """The file name of the library that belongs to these sources on this machine."""
    digest = hashlib.sha256()
    for file in (Path(__file__), *sorted(SOURCES.rglob("*"))):
        if file.suffix in (".cc", ".h", ".py"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"lq_cpu-{digest.hexdigest()[:16]}-{sys.platform}-{platform.machine().lower()}.so"


def cache_directory() -> Path:
    """Where a library goes when the package's own directory can't be written."""
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "lq_kernels"


def find() -> Path | None:
    """The built library of these sources: beside them, or in the user's cache."""
    name = library_name()
    return next((d / name for d in (PACKAGE, cache_directory()) if (d / name).is_file()), None)


def build(directory: Path | None = None) -> Path:
    """Compiles and links, and puts the library into `directory` in one step, so that nobody ever loads half of one.

    An instruction set that this compiler does not know is left out. Without `directory` the library goes beside the
    sources, or into the user's cache when that is read-only.

    Raises BuildError with the compiler's words.
    """
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found: install g++ or clang++, or name one in CXX")
    directory = Path(directory or (PACKAGE if os.access(PACKAGE, os.W_OK) else cache_directory()))
    directory.mkdir(parents=True, exist_ok=True)
    extra = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    units = [unit for unit in UNITS if platform.machine().lower() in unit.machines]
    with tempfile.TemporaryDirectory(prefix="lq_cpu-") as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        compile_one = functools.partial(_compile, command, extra, scratch)
        plain = pool.submit(compile_one, Unit("plain", (), ()))
        optional = [pool.submit(compile_one, unit) for unit in units]
        built = [unit for unit, future in zip(units, optional, strict=True) if future.exception() is None]
        compile_one(Unit("ffi", (), tuple(f"-DLQ_{unit.name.upper()}" for unit in built)))
        plain.result()
        objects = [str(Path(scratch) / f"{name}.o") for name in ("ffi", "plain", *(unit.name for unit in built))]
        linked = Path(scratch) / "library.so"
        _run([*command, "-shared", *extra, *objects, "-o", str(linked)])
        return _install(linked.read_bytes(), directory)


def _install(library: bytes, directory: Path) -> Path:
    """Writes the library in one step, and removes those of earlier sources."""
    target = directory / library_name()
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".lq_cpu-", delete=False) as staged:
        staged.write(library)
    Path(staged.name).chmod(0o755)
    Path(staged.name).replace(target)
    for old in directory.glob("lq_cpu-*.so"):
        if old != target and directory == PACKAGE:
            old.unlink(missing_ok=True)
    return target


def _compile(command: list[str], extra: tuple[str, ...], scratch: str, unit: Unit) -> None:
    source, target = SOURCES / f"{unit.name}.cc", Path(scratch) / f"{unit.name}.o"
    _run([*command, *FLAGS, *extra, *unit.flags, f"-I{SOURCES}", "-c", str(source), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the C++ kernels of lq_kernels.")
    parser.add_argument("--directory", type=Path, help="where to put the library (default: beside the sources)")
    parser.add_argument("--force", action="store_true", help="build even when the library is there")
    parser.add_argument("--quiet", action="store_true", help="say nothing, and never fail")
    arguments = parser.parse_args()
    found = None if arguments.force or arguments.directory else find()
    try:
        library = found or build(arguments.directory)
    except BuildError as error:
        if not arguments.quiet:
            print(error, file=sys.stderr)
        return 0 if arguments.quiet else 1
    if not arguments.quiet:
        print(library)
    return 0
