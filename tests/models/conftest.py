"""Tiny checkpoints to open, and to spoil."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

RECORDED = Path(__file__).parents[1] / "fixtures" / "models"


@pytest.fixture(scope="session")
def recorded() -> Path:
    """The directory of recorded checkpoints, one per case; read only."""
    return RECORDED


@pytest.fixture
def copy_of(tmp_path):
    """`copy_of("llama")`: a checkpoint's own copy, to be changed."""

    def copy(case: str) -> Path:
        directory = tmp_path / case
        directory.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(RECORDED / case / name, directory)
        return directory

    return copy


@pytest.fixture
def edit_config():
    """`edit_config(directory, key=value, ...)` changes config.json; a value of None removes the key."""

    def edit(directory: Path, **changes) -> None:
        file = directory / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return edit


@pytest.fixture
def edit_weights():
    """`edit_weights(directory, change)`: `change` gets the dict of tensors and returns the one to store."""

    def edit(directory: Path, change) -> None:
        file = directory / "model.safetensors"
        save_file(change(load_file(file)), file)

    return edit


@pytest.fixture
def shard():
    """`shard(directory, names)` splits the weights in two files with an index; `names` go to the second."""

    def split(directory: Path, names) -> list[Path]:
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        files = [directory / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        weight_map = {name: files[name in names].name for name in tensors}
        for file in files:
            save_file({name: tensors[name] for name in tensors if weight_map[name] == file.name}, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return files

    return split
