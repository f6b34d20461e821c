"""Which code computes: what has to be the same for interrupted work to end in the bytes that it would have ended in."""

import functools
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from lq import __version__


@functools.cache
def code_version() -> dict[str, str]:
    """`{"lq": "0.1.0, sources 3f2a9c01d4e5", "jax": "0.10.2", "jaxlib": "0.10.2"}`.

    The digest of the sources, of lq and its kernels, tells apart what a release number does not: a checkout that
    someone works on.
    """
    libraries = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"lq": f"{__version__}, sources {_sources_digest()}", **libraries}


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for package in ("lq", "lq_kernels"):
        # Neither is None: both packages are installed with this one, and have folders.
        for folder in importlib.util.find_spec(package).submodule_search_locations:  # type: ignore[union-attr]
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
