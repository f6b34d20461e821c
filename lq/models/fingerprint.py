"""A short name for one very model, so that scores, plans and runs of another are told apart."""

import hashlib

import jax
import numpy as np

from lq.models.source import ParameterSource


def fingerprint(source: ParameterSource) -> str:
    """16 hexadecimal digits from the config and from the first row of every leaf of four parts: embed, both end blocks,
    head.

    Two fine-tunes of one base differ in it; the same weights in one file or in shards do not.
    """
    digest = hashlib.sha256(repr(source.config).encode())
    last = source.config.num_blocks - 1
    for part in dict.fromkeys(("embed", "block_0", f"block_{last}", "head")):
        for path, leaf in jax.tree_util.tree_leaves_with_path(source.part(part)):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf[:1]).tobytes())
    return digest.hexdigest()[:16]
