"""A short name for one very model, so that scores, plans and runs of another are told apart."""

import hashlib

from lq.models.source import ParameterSource


def fingerprint(source: ParameterSource) -> str:
    """16 hexadecimal digits from the config and from a sample of every leaf: vectors whole, a grid over each matrix.

    The same weights give the same digits from one file, from shards and from memory; in another dtype they give
    others. A file is read at the sampled places only (`lq.models.source.sampled`), some hundred a matrix.

    Not noticed is a change that misses every sampled weight: a few rows of an embedding, a handful of edited elements,
    a corrupted page. It tells models apart and is no checksum.
    """
    digest = hashlib.sha256(repr(source.config).encode())
    parts = ("embed", *(f"block_{i}" for i in range(source.config.num_blocks)), "head")
    for part in parts:
        for path, sample in sorted(source.samples(part).items()):
            digest.update(f"{part}/{path} {sample.dtype} {sample.shape} ".encode())
            digest.update(sample.tobytes())
    return digest.hexdigest()[:16]
