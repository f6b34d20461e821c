"""The recorded checkpoints of every family (`tests/fixtures/models`), block by block."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lq.models.loading import open_checkpoint

MODELS = Path(__file__).parent / "fixtures" / "models"
CASES = sorted(path.name for path in MODELS.iterdir())


def blocks_of(case: str, dtype: str):
    """`(config, kind, parameters)` of the first block of each kind; leaves in `dtype`."""
    checkpoint = open_checkpoint(MODELS / case)
    config = checkpoint.config
    for index in sorted({config.kinds.index(kind) for kind in config.kinds}):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), checkpoint.block(index))
        yield config, config.kinds[index], params


def states(config, seed: int = 0, shape=(2, 12), dtype="float32"):
    """Random hidden states `[B, S, D]` whose channels differ in size by a factor of ten, and tokens `[B, S]`."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-0.5, 0.5, config.hidden_size)
    h = rng.standard_normal((*shape, config.hidden_size)) * sizes
    return h.astype(dtype), rng.integers(1, config.vocab_size, shape).astype(np.int32)
