"""How the C++ library is built: what the compiler cannot do is left out, and nothing ever fails an installation."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lq_kernels.cpu import building

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler")


def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hook(tmp_path):
    """The build hook as Hatchling makes it, for a wheel of this checkout."""
    pytest.importorskip("hatchling")
    kernels = load(ROOT / "tools" / "build_kernels.py", "build_kernels")
    return kernels.KernelsHook(str(ROOT), {}, None, None, str(tmp_path), "wheel")


def test_compiler_is_the_one_in_the_environment(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -x")
    assert building.compiler() == [sys.executable, "-x"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert building.compiler() is None


def test_without_a_compiler_the_build_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(building.BuildError, match="install g\\+\\+ or clang\\+\\+, or name one in CXX"):
        building.build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
@pytest.mark.parametrize("version", ["standard", "editable"])
def test_a_wheel_without_a_working_compiler_is_pure(monkeypatch, tmp_path, command, version):
    monkeypatch.setenv("CXX", command)
    data = {"force_include": {}}
    one = hook(tmp_path)
    one.initialize(version, data)
    one.finalize(version, data, "")
    assert data == {"force_include": {}}


@pytest.mark.once
@needs_compiler
def test_a_wheel_with_a_compiler_is_for_this_platform_and_any_python(tmp_path):
    data = {"force_include": {}}
    one = hook(tmp_path)
    one.initialize("standard", data)
    ((library, inside),) = data["force_include"].items()
    assert inside == f"lq_kernels/cpu/{building.library_name()}"
    assert Path(library).stat().st_size > 10_000
    assert data["tag"].startswith("py3-none-")
    assert data["pure_python"] is False
    one.finalize("standard", data, "")
    assert not Path(library).exists()


@needs_compiler
def test_instruction_sets_unknown_to_the_compiler_are_left_out(monkeypatch, tmp_path):
    wrapper = tmp_path / "old-compiler"
    real = " ".join(building.compiler())
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-mavx*|*neon*) exit 1;; esac\nexec {real} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(wrapper))
    library = building.build(tmp_path / "out")
    show = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).lq_instruction_sets; f.restype = ctypes.c_char_p; print(f(0))"
    )
    done = subprocess.run([sys.executable, "-c", show, str(library)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "b'plain'"
    assert list(library.parent.iterdir()) == [library]


def test_another_source_is_another_library(tmp_path):
    copy = tmp_path / "cpu"
    shutil.copytree(building.PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    same = load(copy / "building.py", "same_building")
    assert same.library_name() == building.library_name()
    with (copy / "src" / "ffi.cc").open("a", encoding="utf-8") as file:
        file.write("// changed\n")
    assert same.library_name() != building.library_name()
    assert same.find() is None or same.find().parent != copy


SHARDED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from products import assert_product, random_matrix, random_rows
from lq_kernels import quantized_matmul

w = random_matrix(4, 128, 96, 64)
x = random_rows(16, 128)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
x = jax.device_put(x, jax.NamedSharding(mesh, P("rows")))
product = lambda x, w: quantized_matmul(x, w, backend="cpu")
run = jax.shard_map(product, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))
y = jax.jit(run)(x, w)
assert len(y.sharding.device_set) == 8
assert_product(y, x, w)
"""


@needs_compiler
def test_inside_shard_map_on_eight_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | flags | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
