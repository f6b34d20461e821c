"""Hatchling's build hook: compiles the CPU kernels when a wheel is made and a C++ compiler is there.

Optional throughout: without a compiler, or with one that fails, the wheel is the pure one and nothing is said;
`lq_kernels.cpu.status()` tells the user. Nothing but the sources is needed (`kernels/lq_kernels/cpu/building.py` says
why), so the hook adds no requirement to the isolated environment in which pip builds.

- `pip install .`, a wheel from the sdist: the library goes into the wheel, which then is for this platform. It does not
  use Python's ABI, so one wheel serves every Python 3.
- `pip install --editable .`: it goes beside the sources.
"""

import importlib.util
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "kernels/lq_kernels/cpu"


class KernelsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        module = _load(Path(self.root) / PACKAGE / "building.py")
        try:
            if version == "editable":
                if module.find() is None:
                    module.build()
                return
            self._directory = tempfile.TemporaryDirectory(prefix="lq_kernels-")
            library = module.build(Path(self._directory.name))
        except (module.BuildError, OSError):
            return
        build_data["force_include"][str(library)] = f"lq_kernels/cpu/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if hasattr(self, "_directory"):
            self._directory.cleanup()


def _load(file: Path):
    """The module in `file`, without importing its package, which needs jax."""
    spec = importlib.util.spec_from_file_location("lq_build_kernels", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
