"""What goes into every matrix of a model, reduced to a number for each input channel, by one pass of the text."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.calibration.stream import batches, embed_batches, through_block
from lq.calibration.taps import block_inputs, input_statistics
from lq.models.source import ParameterSource
from lq.numerics.sharded import to_host


def input_energies(source: ParameterSource, windows: Windows, batch_size: int) -> dict[str, Float[Array, "... K"]]:
    """The mean square of every input channel of every block matrix, by path; of experts, over the tokens they saw."""
    rows = batches(windows.tokens, batch_size)
    hidden = embed_batches(source, windows.tokens, batch_size)
    found = {}
    for index, kind in enumerate(source.config.kinds):
        params = source.block(index, jnp.float32)
        inputs = block_inputs(source.config, kind)
        every, needs = tuple(range(len(inputs))), frozenset({"square"})
        totals = None
        for tokens, h in zip(rows, hidden, strict=True):
            new = input_statistics(source.config, kind, params, h, tokens, None, every, needs)
            totals = new if totals is None else [a + b for a, b in zip(totals, new, strict=True)]
        for one, stats in zip(inputs, totals or [], strict=True):
            found |= {f"block_{index}/{path}": to_host(stats.mean_square) for path in one.readers}
        hidden = through_block(source.config, kind, params, rows, hidden)
    return found
