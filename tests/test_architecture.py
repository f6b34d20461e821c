"""Who may import whom, what importing costs, and what the repository may not say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lower rooms first; a room may import itself and anything below.
ORDER = [
    {"errors", "atomic", "sealed", "lock", "registry", "progress", "processes", "version"},
    {"numerics"},
    {"models"},
    {"calibration"},
    {"evaluation"},
    {"quantizers", "transforms"},
    {"importance"},
    {"allocation"},
    {"search"},
    {"checkpoint", "parallel"},
    {"assets"},
    {"pipeline"},
    {"api", "catalogue"},
    {"runs"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imports_of(file: Path) -> set[str]:
    """Dotted names imported anywhere in the file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(file) if name.startswith("lq.") and name.count(".") > 0}


@pytest.mark.parametrize("file", sorted((ROOT / "lq").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_imports_upward(file):
    relative = file.relative_to(ROOT / "lq")
    room = relative.parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for other in rooms(file):
        if other in LEVEL:
            same_level = LEVEL[other] == LEVEL[room] and other != room
            assert LEVEL[other] <= LEVEL[room], f"{relative} imports lq.{other}, which is above lq.{room}"
            assert not same_level or LEVEL[room] == 0 or room in ("api", "runs"), (
                f"{relative} imports its neighbour lq.{other}"
            )


def test_kernels_know_jax_and_numpy_only():
    # jaxlib is what jax is made of; its MLIR bindings have no other name.
    allowed = {"jax", "jaxlib", "numpy", "lq_kernels", *sys.stdlib_module_names}
    for file in (ROOT / "kernels" / "lq_kernels").rglob("*.py"):
        assert {name.split(".")[0] for name in imports_of(file)} <= allowed, file.name


@pytest.mark.parametrize("module", ["lq", "lq.cli"])
def test_importing_is_cheap(module):
    heavy = ["jax", "flax", "transformers", "matplotlib", "numpy", "pydantic", "scipy"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_models_does_not_import_transformers():
    code = "import sys, lq.models.loading, lq.api; print('transformers' in sys.modules, 'matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False False"
