"""The text the stand-in model is trained on: Python sources and their docstrings, from what every installation has.

The standard library of the running interpreter, and the installed packages in `PACKAGES`, all under licences that
permit redistribution of the excerpts shipped with the model. Tests, generated tables and very long files are left out;
byte-equal files are kept once. Files are split by a hash of their name, so that a file is in one split only and stays
there when others come or go.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {  # import name: (distribution, licence)
    "numpy": ("numpy", "BSD-3-Clause"),
    "scipy": ("scipy", "BSD-3-Clause"),
    "jax": ("jax", "Apache-2.0"),
    "flax": ("flax", "Apache-2.0"),
    "optax": ("optax", "Apache-2.0"),
    "orbax": ("orbax-checkpoint", "Apache-2.0"),
    "matplotlib": ("matplotlib", "PSF-based (Matplotlib licence)"),
    "fontTools": ("fonttools", "MIT"),
    "pydantic": ("pydantic", "MIT"),
    "rich": ("rich", "MIT"),
    "typer": ("typer", "MIT"),
    "huggingface_hub": ("huggingface-hub", "Apache-2.0"),
    "transformers": ("transformers", "Apache-2.0"),
}
SKIPPED_DIRS = {"test", "tests", "testing", "_tests", "site-packages", "lib2to3", "__pycache__", "models", "pydoc_data"}
MAX_BYTES, MIN_BYTES = 150_000, 400
HELD_OUT = {0: "evaluation", 1: "calibration"}  # of every 40 files, which bucket goes where
BUCKETS = 40


@dataclasses.dataclass(frozen=True)
class Document:
    source: str  # "stdlib" or an import name
    name: str  # path below the source, with forward slashes
    text: str

    @property
    def split(self) -> str:
        digest = hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()
        return HELD_OUT.get(int.from_bytes(digest[:4], "big") % BUCKETS, "train")


def roots() -> dict[str, Path]:
    """Where each source lies on this machine. Raises ModuleNotFoundError for a package that is not installed."""
    found = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"the corpus needs the package {name!r}; install the project with its dev extra")
        found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found


def documents() -> Iterator[Document]:
    """Every document, in an order that does not depend on the file system."""
    seen = set()
    for source, root in sorted(roots().items()):
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if SKIPPED_DIRS & set(name.parts[:-1]) or not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
                continue
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).digest()
            if digest in seen:
                continue
            seen.add(digest)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield Document(source, name.as_posix(), text.replace("\r\n", "\n"))


def provenance() -> list[dict]:
    """Source, version and licence of everything read."""
    import platform

    rows = [{"source": "stdlib", "distribution": "CPython", "version": platform.python_version(), "licence": "PSF-2.0"}]
    for name, (distribution, licence) in PACKAGES.items():
        version = importlib.metadata.version(distribution)
        rows.append({"source": name, "distribution": distribution, "version": version, "licence": licence})
    return rows
