"""Fixtures for all tests."""

import atexit
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

# Before jax is imported, and once for all workers and the commands they start: a program is compiled once a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lq-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from small_models import llama_config, random_params, write_directory

from lq.assets import ASSETS
from lq.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class SmallModel:
    path: Path
    config: ModelConfig
    params: dict


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """Every program is several memory maps, of which a process may have 65,530: a worker would run out."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> SmallModel:
    """Three random blocks of width 64, bfloat16, tied embeddings."""
    config = llama_config()
    params = random_params(config)
    return SmallModel(write_directory(tmp_path_factory.mktemp("small") / "model", config, params), config, params)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A few thousand tokens of the shipped evaluation text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ASSETS / "texts" / "evaluation.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path
