"""The model run on from any block, with states or weights there that are not its own; and what its output is then.

    run = Replay(source, windows, batch_size)
    for index, params, before, after in run.blocks():          # the model as it is
        changed = run.through(index, change(params), before)   # one block with other weights
        run.kl(run.to_end(index + 1, changed))                 # and the rest of the model behind it

Weights of one block at a time are held, and the hidden states of all windows, on the host: what is too large for a
`Judge`, which keeps every block on the device, can still be asked here, at the price of reading a block again whenever
a run comes through it. All in float32; sums over windows are float64.
"""

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from lq.calibration.data import Windows
from lq.calibration.stream import batches, embed_batches, through_block
from lq.errors import UserError
from lq.evaluation.evaluate import head_params_of, scored_targets, window_sums
from lq.models.source import ParameterSource, Params
from lq.numerics.sharded import to_host

States = list[np.ndarray]  # hidden states of all windows, one array [B, S, D] a batch


class Replay:
    """A model on given windows. Raises UserError for windows in which nothing is predicted.

    `passes` counts what was computed: forward passes of all windows through all blocks, one block as 1 / L of one; the
    head is not counted.
    """

    def __init__(self, source: ParameterSource, windows: Windows, batch_size: int):
        self.source, self.config = source, source.config
        self.head_params = head_params_of(source)
        self.passes = 0.0
        self._windows, self._batch_size = windows, batch_size
        self._rows = batches(windows.tokens, batch_size)
        self._scored = scored_targets(windows)
        if not self._scored.any():
            raise UserError("windows: of one token, behind which nothing is predicted; give longer ones")

    def blocks(self) -> Iterator[tuple[int, Params, States, States]]:
        """Index, parameters in float32, and the states before and after every block. One pass."""
        after = self._embedded()
        for index in range(self.config.num_blocks):
            params, before = self._block(index), after
            after = self.through(index, params, before)
            yield index, params, before, after

    @functools.cached_property
    def reference(self) -> States:
        """The model's own states behind its last block. One pass, the first time."""
        return self.to_end(0, self._embedded())

    def through(self, index: int, params: Params, states: States) -> States:
        """The states after block `index` with these parameters."""
        self.passes += 1 / self.config.num_blocks
        return through_block(self.config, self.config.kinds[index], params, self._rows, states)

    def to_end(self, index: int, states: States) -> States:
        """The states behind the last block, from those in front of block `index`."""
        for later in range(index, self.config.num_blocks):
            states = self.through(later, self._block(later), states)
        return states

    def nll(self, final: States) -> float:
        """Mean negative log-likelihood of the scored tokens, nats, of the states behind the last block."""
        return self._mean(0, final, None, 0)

    def kl(self, final: States, first: int = 0) -> float:
        """Mean KL divergence to the model itself, nats per scored token; of those predicted from `first` on."""
        return self._mean(1, final, self.reference, first)

    def lens(self, states: States) -> float:
        """Mean KL divergence of what `states` would say, read as the last ones, from what the model says."""
        return self._mean(1, self.reference, states, 0)

    def _mean(self, column: int, final: States, originals: States | None, first: int) -> float:
        scored = self._scored.copy()
        scored[:, :first] = False
        total = 0.0
        for i, mask in enumerate(batches(scored, self._batch_size)):
            original = None if originals is None else (self.head_params, originals[i])
            sums = window_sums(self.config, self.config, self.head_params, self._rows[i], mask, final[i], original)
            total += to_host(sums).astype(np.float64)[:, column].sum()
        return float(total / scored.sum())

    def _embedded(self) -> States:
        return embed_batches(self.source, self._windows.tokens, self._batch_size)

    def _block(self, index: int) -> Params:
        return self.source.block(index, jnp.float32)
