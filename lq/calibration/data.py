"""Text, and the token windows cut from it.

Named corpora follow the protocols of the GPTQ paper's code, which nearly every published table uses:

- `wikitext2`: wikitext-2-raw-v1, all lines of the split joined with a blank line, tokenized once.
- `c4`: allenai/c4 `en`. Evaluation: the first 1,100 documents of validation shard 00000-of-00008 joined by a space,
  tokenized once, the first 256 windows. Calibration: documents of train shard 00000-of-01024 drawn at random until one
  is longer than a window, a random window of it; repeated.

Anything else is a text file, or a directory whose `.txt` files are joined in name order.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from lq.errors import UserError

CORPORA = ("wikitext2", "c4")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token windows `[count, length]` int32 and where they came from. Raises UserError for tokens that are none."""

    tokens: np.ndarray
    source: str  # file name or corpus
    how: str  # the protocol in words
    stride: int | None = None  # tokens from one window to the next; None when they do not overlap

    def __post_init__(self):
        shape, dtype = getattr(self.tokens, "shape", ()), getattr(self.tokens, "dtype", None)
        if len(shape) != 2 or 0 in shape or np.dtype(dtype).kind not in "iu":
            raise UserError(
                f"windows: tokens {list(shape)} of {dtype}; give whole numbers [windows, length], at least one"
            )
        stride_of(self.tokens.shape[1], self.stride)

    @property
    def fingerprint(self) -> str:
        """Identifies the very tokens: two scores are comparable when these agree."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens, np.int32).tobytes()).hexdigest()[:16]


def read_text(path: str | Path) -> str:
    """The text of a file, or of the `.txt` files of a directory joined by a blank line."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(f"{path}: a directory without .txt files; give a text file, or one of {', '.join(CORPORA)}")
        return "\n\n".join(read_text(f) for f in files)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such text file; give a file, or one of {', '.join(CORPORA)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None


def encode(tokenizer, text: str) -> np.ndarray:
    """The whole text tokenized once, int32; a start token stands only where the tokenizer puts one."""
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)


def evaluation_windows(
    tokenizer, data: str, length: int, *, stride: int | None = None, limit: int | None = None
) -> Windows:
    """Consecutive windows of `length` tokens, `stride` apart (`length` when None: not overlapping); the remainder is
    dropped. Only the first `limit` are cut; all when None.

    Raises UserError for a length below 2, a limit below 1, and a text shorter than one window.
    """
    _at_least(2, length=length)
    _at_least(1, limit=1 if limit is None else limit)
    stride = stride_of(length, stride)
    if data == "wikitext2":
        text = "\n\n".join(_load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")["text"])
    elif data == "c4":
        text = " ".join(_c4("validation", "en/c4-validation.00000-of-00008.json.gz")[:1100]["text"])
        limit = min(limit or 256, 256)
    else:
        text = read_text(data)
    stream = _encode_at_least(tokenizer, text, length, data)
    starts = np.arange(0, stream.size - length + 1, stride)[:limit]
    how = f"{length}-token windows, stride {stride}, tokenized once"
    return Windows(np.stack([stream[s : s + length] for s in starts]), str(data), how, stride)


def stride_of(length: int, stride: int | None) -> int:
    """The stride itself, or the length when None. Raises UserError when it is not between 1 and the length."""
    stride = length if stride is None else stride
    if not 0 < stride <= length:
        raise UserError(f"stride: {stride} is not between 1 and the window of {length} tokens")
    return stride


def calibration_windows(tokenizer, data: str, samples: int, length: int, seed: int = 0) -> Windows:
    """`samples` windows of `length` tokens at random places, decided by `seed` alone.

    Raises UserError for a length below 2, no samples, a negative seed, and a text shorter than one window.
    """
    _at_least(2, length=length)
    _at_least(1, samples=samples)
    _at_least(0, seed=seed)
    generator = np.random.default_rng(seed)
    how = f"{samples} random windows of {length} tokens, seed {seed}"
    if data == "c4":
        documents = _c4("train", "en/c4-train.00000-of-01024.json.gz")
        return Windows(_windows_of_documents(tokenizer, documents, samples, length, generator), data, how)
    if data == "wikitext2":
        text = "\n\n".join(_load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train")["text"])
    else:
        text = read_text(data)
    stream = _encode_at_least(tokenizer, text, length, data)
    starts = generator.integers(0, stream.size - length + 1, samples)
    return Windows(np.stack([stream[s : s + length] for s in starts]), str(data), how)


def _at_least(least: int, **given: int) -> None:
    """Raises UserError for an argument below `least`."""
    for name, value in given.items():
        if value < least:
            raise UserError(f"{name}: {value}; write {least} or more")


def _encode_at_least(tokenizer, text: str, length: int, source: str) -> np.ndarray:
    stream = encode(tokenizer, text)
    if stream.size < length:
        raise UserError(
            f"{source}: {stream.size} tokens, fewer than one window of {length}; give more text or a shorter window"
        )
    return stream


def _windows_of_documents(tokenizer, documents, samples: int, length: int, generator) -> np.ndarray:
    windows = []
    for _ in range(1000 * samples):
        if len(windows) == samples:
            return np.stack(windows)
        stream = encode(tokenizer, documents[int(generator.integers(len(documents)))]["text"])
        if stream.size > length:
            start = int(generator.integers(0, stream.size - length))
            windows.append(stream[start : start + length])
    raise UserError(f"c4: hardly a document is longer than {length} tokens; give a shorter calibration length")


def _load_dataset(*args, **kwargs):
    """`datasets.load_dataset(name, config, split)`, its absence and a missing network turned into one line."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{args[0]}: needs the datasets package; pip install 'lq[eval]', or give a text file") from None
    *name, split = args
    try:
        return datasets.load_dataset(*name, split=split, **kwargs)
    except Exception as error:  # the hub client raises many kinds; all mean that the corpus is not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{args[0]}: could not be loaded from the hub ({reason}); give a text file instead") from error


def _c4(split: str, file: str):
    return _load_dataset("allenai/c4", split, data_files={split: file})
