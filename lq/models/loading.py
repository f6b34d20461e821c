"""Opening a model directory in Hugging Face layout, and reading its weights part by part.

    checkpoint = open_checkpoint("path/or/hub-name")
    model, params = Decoder(checkpoint.config), checkpoint.params()

Opening reads config.json and the headers of the safetensors files, and checks the name, shape and dtype of every
tensor; no weight is read yet. Reading maps the files and takes one tensor at a time, so a part costs its own size and
one tensor more.

Nothing a checkpoint brings along is ever executed: pickles are refused, and remote code is off. Every mistake is a
`UserError` of one line: what, where, what to do instead.
"""

import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open

from lq.errors import UserError
from lq.models.config import ModelConfig
from lq.models.families import FAMILIES, eos_token_ids, tensors_of
from lq.models.layout import placed_leaf
from lq.models.names import StoredTensor, leaves_from
from lq.models.raw_config import check_values
from lq.models.source import InMemory, ParameterSource, Params, sampled

__all__ = [
    "Checkpoint",
    "InMemory",
    "ParameterSource",
    "is_quantized",
    "load_tokenizer",
    "open_checkpoint",
    "read_config",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST, PROGRESS = "lq.json", "shards.json"  # of a checkpoint that lq quantized, see `lq.checkpoint.layout`
DTYPES = {"BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
CONFIG_FILES = ["config.json", "generation_config.json"]
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
CONVERT = (
    "convert it where torch is installed: python -c "
    '"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "[C.from_pretrained('{source}').save_pretrained('{target}') for C in (M, T)]\""
)

Place = Callable[[str, np.ndarray], jax.Array]


def open_checkpoint(name_or_path: str | Path, *, place: Place | None = None) -> "Checkpoint":
    """Opens and checks a checkpoint; reads no weights.

    Args:
      name_or_path: a directory with config.json and safetensors weights (one file, or shards with an index), or the
        name of a model on the Hugging Face hub, whose files are then downloaded to the hub's cache.
      place: `(path of the leaf, host array) -> jax array`, puts a leaf where it belongs. When None: on the mesh that is
        in force as it is read (`lq.parallel.use`), on the default device where there is none.

    Raises:
      UserError: there is no such checkpoint, or it is not one lq can run; see the module's docstring.
    """
    directory = _directory(name_or_path)
    if is_quantized(directory):
        raise UserError(f"{directory}: already quantized by lq; give the original model")
    config = read_config(directory)
    tensors = tensors_of(config)
    where = _match(directory, config, tensors, _headers(directory, str(name_or_path)))
    return Checkpoint(directory, config, tensors, where, place or functools.partial(placed_leaf, config))


def config_of(name_or_path: str | Path) -> ModelConfig:
    """The config of a directory, weights or not, or of a model on the hub, of which nothing else is fetched.

    Raises UserError as `open_checkpoint`.
    """
    return read_config(_directory(name_or_path, CONFIG_FILES))


class Checkpoint(ParameterSource):
    """An opened checkpoint: `path`, `config`, and the parameters, read when asked for. Made by `open_checkpoint`."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: tuple[StoredTensor, ...],
        where: Mapping[str, "Header"],
        place: Place,
    ):
        self.path = path
        self.config = config
        self._tensors = tensors
        self._where = where
        self._place = place
        self._parts = list(dict.fromkeys(tensor.part for tensor in tensors))

    def part(self, name: str, dtype=None) -> Params:
        """Read through memory maps, each leaf from there to where it belongs: nothing is held twice.

        The system is told which part is next, and reads it while this one is computed with.

        Raises UserError when a weight is NaN or infinite, or its file cannot be read any more.
        """
        files: dict[Path, Mapped] = {}

        def read(tensor: StoredTensor) -> np.ndarray:
            header = self._where[tensor.name]
            array = _in(files, header.file).view(header)
            if not _all_finite(array):
                raise UserError(
                    f"{header.file}: tensor {header.name} holds NaN or infinite values; fetch or convert it again"
                )
            return array if dtype is None else array.astype(dtype)

        leaves = {}
        for path, array in leaves_from(self._stored_in(name), read):
            leaves[path] = jax.block_until_ready(self._place(path, array))
            for mapped in files.values():
                mapped.release()
        self._expect(self._parts[(self._parts.index(name) + 1) % len(self._parts)])
        return unflatten_dict(leaves, sep="/")[name]

    def _stored_in(self, part: str) -> list[StoredTensor]:
        return [tensor for tensor in self._tensors if tensor.part == part]

    def _expect(self, part: str) -> None:
        """Tells the system that a part is read next."""
        if not hasattr(os, "posix_fadvise"):
            return
        ranges: dict[Path, list[Header]] = {}
        for tensor in self._stored_in(part):
            ranges.setdefault(self._where[tensor.name].file, []).append(self._where[tensor.name])
        for file, headers in ranges.items():
            with contextlib.suppress(OSError), file.open("rb") as opened:  # reading it will say what is wrong
                for header in headers:
                    os.posix_fadvise(opened.fileno(), header.start, header.nbytes, os.POSIX_FADV_WILLNEED)

    def samples(self, name: str) -> dict[str, np.ndarray]:
        """Through memory maps: reads what it returns and no more."""
        files: dict[Path, Mapped] = {}
        found: dict[str, list[np.ndarray]] = {}
        for tensor in self._stored_in(name):
            header = self._where[tensor.name]
            for path, piece in tensor.split(_in(files, header.file, random=True).view(header)):
                piece = sampled(piece)
                found.setdefault(path.partition("/")[2], []).append(piece if tensor.expert is None else piece[None])
        return {path: np.concatenate(pieces) for path, pieces in found.items()}


def is_quantized(path: str | Path) -> bool:
    """Whether a directory is a checkpoint that lq quantized, complete or interrupted."""
    return (Path(path) / MANIFEST).is_file() or (Path(path) / PROGRESS).is_file()


def load_tokenizer(path: str | Path):
    """The tokenizer of a model directory or hub name, a `transformers` object.

    Raises:
      UserError: there are no tokenizer files, or they cannot be read without running code from the checkpoint.
    """
    directory = _directory(path)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as problem:  # tokenizers raise bare Exception on a malformed file
        why = _one_line(problem)
        raise UserError(
            f"{directory}: the tokenizer cannot be read, at least without running its code: {why}"
        ) from problem


def read_config(directory: Path) -> ModelConfig:
    """The `ModelConfig` that config.json describes; generation_config.json may add ids that end a text.

    Raises:
      UserError: a file is missing or malformed, or asks for something lq cannot do.
    """
    file = directory / "config.json"
    raw = _read_json(file)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{file}: model_type {model_type!r} is not supported; known: {known}")
    if "quantization_config" in raw:
        raise UserError(f"{file}: quantization_config: the weights are quantized already; give the original model")
    from transformers import CONFIG_MAPPING

    with _naming(file):
        check_values(raw)
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as problem:  # their validation raises KeyError, ValueError, TypeError and classes of its own
        raise UserError(f"{file}: {_one_line(problem)}") from problem
    with _naming(file):
        config = FAMILIES[model_type].read_config(parsed)
    generation = directory / "generation_config.json"
    if generation.is_file():
        given = _read_json(generation).get("eos_token_id")
        with _naming(generation):
            more = eos_token_ids(given)
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    return config


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says about one tensor."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def _headers(directory: Path, name: str) -> list[Header]:
    """Header of every tensor in every weight file. safetensors checks that a file is as long as its header says."""
    headers = []
    for file in _weight_files(directory, name):
        opened, starts = _open(file), _starts(file)
        for tensor in opened.keys():  # noqa: SIM118 (it is no mapping)
            stored = opened.get_slice(tensor)
            headers.append(Header(file, tensor, stored.get_dtype(), tuple(stored.get_shape()), starts[tensor]))
    return headers


def _weight_files(directory: Path, name: str) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{index}: no weight_map from tensors to files; download or save the checkpoint again")
        for tensor, shard in shards.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise UserError(
                    f"{index}: weight_map: {tensor}: {shard!r} is not the name of a file beside it; "
                    "download or save the checkpoint again"
                )
        files = [directory / name for name in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{index}: names {file.name}, which is not in {directory}; download or copy it there")
        return files
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not Path(name).is_dir():  # pickles are not even downloaded
        convert = CONVERT.format(source=name, target=name.rpartition("/")[2])
        raise UserError(f"{name}: the hub has no safetensors weights of it; {convert}, and give the new directory")
    pickles = sorted(directory.glob("pytorch_model*.bin"))
    if pickles:
        convert = CONVERT.format(source=directory, target=directory)
        raise UserError(f"{pickles[0]}: a pickle can run code when it is opened, so lq never does; {convert}")
    raise UserError(f"{directory}: no weights; expected {WEIGHTS}, or shards and {INDEX}")


def _match(
    directory: Path, config: ModelConfig, tensors: Iterable[StoredTensor], headers: Iterable[Header]
) -> dict[str, Header]:
    """Where each tensor is stored. Raises UserError unless the files hold these tensors, all of them and no others."""
    family = FAMILIES[config.family]
    stored: dict[str, Header] = {}
    for header in headers:
        twin = stored.setdefault(family.bare(header.name), header)
        if twin is not header:
            raise UserError(f"{header.file}: tensor {header.name} is also {twin.name} in {twin.file}; remove one")
    where, missing = {}, []
    for tensor in tensors:
        header = stored.pop(family.bare(tensor.name), None)
        if header is None:
            missing.append(tensor.name)
            continue
        if header.shape != tensor.shape:
            got, expected = list(header.shape), list(tensor.shape)
            raise UserError(f"{header.file}: tensor {header.name} has shape {got}; config.json asks for {expected}")
        if header.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(
                f"{header.file}: tensor {header.name} is {header.dtype}; lq reads {known}, give such a checkpoint"
            )
        where[tensor.name] = header
    extra = [header for name, header in stored.items() if not family.ignores(name)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = "config.json and the weights are of different models, or a file was not copied"
        found = f"; {extra[0].name} is there and not expected" if extra else ""
        raise UserError(f"{directory}: tensor {missing[0]}{more} is missing{found}; {hint}")
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(
            f"{extra[0].file}: tensor {extra[0].name}{more} is not part of a {config.family} model with this "
            "config.json; correct the config or remove the tensor"
        )
    return where


def _all_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, at several GB/s; `np.isfinite` manages one for bfloat16.

    The bits of such a value, without the sign and read as an integer, are at least those of infinity. One piece of the
    array at a time stays in the cache.
    """
    integers = np.dtype(f"uint{8 * array.itemsize}")
    infinity = np.asarray(np.inf, array.dtype).view(integers)
    bits = array.reshape(-1).view(integers)
    piece = 1 << 18
    return all((bits[i : i + piece] << 1).max() < infinity << 1 for i in range(0, bits.size, piece))


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{file}: damaged or incomplete ({_one_line(problem)}); download or copy it again") from problem


def _starts(file: Path) -> dict[str, int]:
    """Where every tensor's bytes begin. A file begins with the length of its header, 8 bytes, and the header, JSON."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        places = json.loads(opened.read(length))
    return {name: 8 + length + place["data_offsets"][0] for name, place in places.items() if name != "__metadata__"}


class Mapped:
    """A file's tensors as views of a memory map, none of them read yet.

    Raises UserError for a file that cannot be read any more.
    """

    def __init__(self, file: Path, *, random: bool = False):
        try:
            with file.open("rb") as opened:
                self._pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as problem:
            raise UserError(f"{file}: cannot be read ({problem.strerror}); download or copy it again") from problem
        if random and hasattr(mmap, "MADV_RANDOM"):
            self._pages.madvise(mmap.MADV_RANDOM)  # or the system reads megabytes around every sampled place
        self._file, self._bytes = file, np.frombuffer(self._pages, np.uint8)

    def view(self, header: Header) -> np.ndarray:
        found = self._bytes[header.start : header.start + header.nbytes]
        if found.size != header.nbytes:
            raise UserError(f"{self._file}: shorter than it was when it was opened; download or copy it again")
        return found.view(DTYPES[header.dtype]).reshape(header.shape)

    def release(self) -> None:
        """Gives back the memory of what was read so far; a view that is still held reads it again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


def _in(files: dict[Path, Mapped], file: Path, *, random: bool = False) -> Mapped:
    """The map of a file, made when it is first asked for."""
    if file not in files:
        files[file] = Mapped(file, random=random)
    return files[file]


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent}: no {file.name}; give a model directory in Hugging Face layout, or a hub name"
        ) from None
    except OSError as problem:
        raise UserError(f"{file}: cannot be read ({problem.strerror}); download or copy it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{file}: not valid JSON: {_one_line(problem)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; download or copy it again")
    return value


def _directory(name_or_path: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """The directory itself, or where the hub's files were put; `files` are patterns of those wanted."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory; give a model directory in Hugging Face layout, or a hub name")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # Weights in subdirectories and "consolidated" files are second copies in other layouts.
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(files), ignore_patterns=["*/*", "consolidated*.safetensors"]
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as problem:  # not there, not allowed, or no network and no copy
        raise UserError(f"{name}: neither a directory nor a model the hub gave: {_one_line(problem)}") from problem


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Puts the file before the message of a UserError that knows only the key."""
    try:
        yield
    except UserError as problem:
        raise UserError(f"{file}: {problem}") from None


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__
