"""`QuantizedStream`: a model quantized block by block with the help of calibration text, read like any other source.

For each block its inputs are measured on the calibration states, its matrices are quantized, and the states carried on,
through the quantized block or through the original one, as the method says. One block, its statistics and the states
are held, whatever the depth.

A method that *propagates* calibrates a block on what the quantized blocks before it let through, so that it makes up
for their errors. One that reconstructs blocks besides aims at the original model's states, a second chain:

    GPTQ, RSQ, BAQ                  propagate; matrix after matrix inside a block (true sequential)
    AWQ                             does not: states are the original model's throughout
    AutoRound, FlexRound, AdaQuant  propagate, aim at the original block's output on the original chain
    rtn, HQQ                        read no text; what goes with them does: channel scales and importance are found on
                                    the original states, biases corrected on the quantized ones

`Recipe.propagate` decides otherwise, for any of them.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, MutableMapping

import jax
import jax.numpy as jnp
import numpy as np

from lq.calibration.data import Windows
from lq.calibration.statistics import SAMPLE_ROWS, InputStats, lookup_statistics, reduce_inputs
from lq.calibration.stream import batches, embed_batches, stream
from lq.models.config import ModelConfig
from lq.models.decoder import head_input
from lq.models.layout import place_part
from lq.models.matrices import EMBEDDING, HEAD
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.numerics.spec import QuantSpec
from lq.quantizers.apply import check_packed, check_weight, read_matrix, with_matrix
from lq.quantizers.block import CalibratedBlock, dense, quantize_block
from lq.quantizers.matrix import NOTHING, MeasuredInput, Note
from lq.quantizers.placement import Place, like, over_local_devices
from lq.quantizers.planned import DENSE_DTYPE, sixteen_bits
from lq.quantizers.recipe import Recipe


@dataclasses.dataclass
class Chains:
    """Calibration states at the input of block `position`, on the host: one array `[B, S, D]` a batch."""

    position: int
    states: list[np.ndarray]  # what the method calibrates on
    original: list[np.ndarray] | None  # the original model's, where they are needed and are others


class QuantizedStream(ParameterSource):
    """The parts of `source` with the matrices in `specs` packed by a calibrated method.

    Parts are computed in order, the embedding first. Asking for a part computes the blocks before it that have not been
    asked for; asking for an earlier block starts over. The embedding is kept.

    Args:
      source: the original, transformed or not, dense.
      specs: matrix path -> spec.
      recipe: method, options and what goes with it.
      windows: calibration tokens.
      batch_size: windows per device step.
      cache: keeps packed blocks between streams that share it, of recipes that do not propagate; for comparing many
        plans of a model that fits in memory.
      place: lays a weight `[K, N]` out over devices while it is quantized, see `over_columns`; those of this process
        when None.
      note: called with a line for the user, such as that experts saw few tokens.

    `report` fills with what is measured of every matrix.

    Raises UserError for a recipe that cannot be carried out on this model, and, naming the matrix, for weights or
    statistics that are not finite.
    """

    def __init__(
        self,
        source: ParameterSource,
        specs: Mapping[str, QuantSpec],
        recipe: Recipe,
        windows: Windows,
        *,
        batch_size: int = 8,
        cache: MutableMapping | None = None,
        place: Place | None = None,
        note: Note = lambda line: None,
    ):
        recipe.check(source.config, specs)
        for line in recipe.notes(source.config, specs):
            note(line)
        self.config = source.config
        self.report: dict[str, dict[str, float]] = {}
        self._source, self._specs, self._recipe = source, specs, recipe
        self._windows, self._tokens = windows, batches(windows.tokens, batch_size)
        self._batch_size, self._place, self._note = batch_size, place or over_local_devices(), note
        self._cache = None if recipe.propagate else cache  # what propagates depends on every block before
        self._chains: Chains | None = None
        self._embed: Params | None = None

    def part(self, name: str, dtype=None) -> Params:
        if name == "embed":
            self._embed = self._embed or sixteen_bits(self._quantized_embedding())
            packed = self._embed
        elif name == "head":
            packed = sixteen_bits(self._quantized_head())
        else:
            packed = self._quantized_block(int(name.removeprefix("block_")))
        packed = place_part(self.config, name, packed)
        return packed if dtype is None else sixteen_bits(packed, dtype)

    def chains(self) -> Chains:
        """The states that the next block is calibrated on. Kept to the bit, they let another process go on."""
        if self._chains is None:
            states = self._first_states()
            original = None
            if self._recipe.propagate and self._recipe.reconstructs_blocks:
                original = embed_batches(self._source, self._windows.tokens, self._batch_size)
            self._chains = Chains(0, states, original)
        return self._chains

    def restore(self, chains: Chains) -> None:
        """Goes on where another process was when its `chains()` were these."""
        self._chains = chains

    def _first_states(self) -> list[np.ndarray]:
        source: ParameterSource = self._source
        if EMBEDDING in self._specs and self._recipe.propagate:
            source = _Embedding(self.config, self.part("embed", jnp.float32))
        return embed_batches(source, self._windows.tokens, self._batch_size)

    def _quantized_block(self, index: int) -> Params:
        key = (index, tuple(self._block_specs(index).items()), self._recipe, self._windows.fingerprint)
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        self._advance(index)
        packed = self._next_block()
        if self._cache is not None:
            self._cache[key] = packed
        return packed

    def _advance(self, index: int) -> None:
        """Brings the chains to block `index`. What propagates goes through the quantized blocks before it."""
        if self.chains().position > index:
            self._chains = None
        while self.chains().position < index:
            if self._recipe.propagate:
                self._next_block()
            else:
                block, _ = self._calibrated_block()
                self._chains = Chains(self.chains().position + 1, block.outputs(block.params), None)

    def _block_specs(self, index: int) -> dict[str, QuantSpec]:
        """By path within the block."""
        prefix = f"block_{index}/"
        return {path.removeprefix(prefix): spec for path, spec in self._specs.items() if path.startswith(prefix)}

    def _calibrated_block(self) -> tuple[CalibratedBlock, Params]:
        """The block at which the chains stand, and its parameters as they are stored."""
        chains = self.chains()
        stored = self._source.block(chains.position)
        where = (self.config, self.config.kinds[chains.position], f"block_{chains.position}")
        return CalibratedBlock(*where, dense(stored), self._tokens, chains.states, stored_dtype(stored)), stored

    def _next_block(self) -> Params:
        chains, recipe = self.chains(), self._recipe
        index = chains.position
        block, stored = self._calibrated_block()
        targets = None
        if recipe.reconstructs_blocks or not recipe.propagate:
            targets = block.outputs(block.params, chains.original)
        specs = self._block_specs(index)
        packed, report = quantize_block(block, specs, recipe, targets, place=self._place, note=self._note)
        self.report |= {block.path(path): found for path, found in report.items()}
        packed = as_stored(packed, stored)
        if recipe.propagate:
            self._chains = Chains(index + 1, block.outputs(like(dense(packed), block.params)), targets)
        else:
            self._chains = Chains(index + 1, targets or [], None)
        return packed

    # Embedding and head. What the head's matrix is applied to are the last states behind the final norm; a lookup reads
    # a row as it is, so that all channels count alike: the second moment of an embedding's input is the identity.

    def _quantized_embedding(self) -> Params:
        params = self._source.embed()
        if EMBEDDING not in self._specs:
            return params
        stats = None
        if self._recipe.needs and self.config.tie_embeddings:
            stats = self._head_statistics(self._original_last_states())
        return self._with_table(params, EMBEDDING, stats)

    def _quantized_head(self) -> Params:
        params = self._source.head()
        if HEAD not in self._specs:
            return params
        self._advance(self.config.num_blocks)
        return self._with_table(params, HEAD, self._head_statistics(self.chains().states))

    def _with_table(self, params: Params, path: str, stats: InputStats | None) -> Params:
        weight = jnp.asarray(read_matrix(params, path), jnp.float32)
        check_weight(weight, path)
        channels, recipe, of_input = weight.shape[0], self._recipe, NOTHING
        if recipe.needs:
            found = lookup_statistics(channels, recipe.needs) if stats is None else stats
            of_input = MeasuredInput.of(found, path, channels, recipe, self._note)
        tensor, self.report[path] = of_input.quantize(weight, self._specs[path], recipe, self._place)
        return with_matrix(params, path, check_packed(tensor, path))

    def _head_statistics(self, last: list[np.ndarray]) -> InputStats | None:
        if not self._recipe.needs:
            return None
        params = self._source.head(jnp.float32)
        rows = max(1, SAMPLE_ROWS // len(last))
        found = [_head_statistics(self.config, params, h, self._recipe.needs, rows) for h in last]
        return functools.reduce(operator.add, found)

    def _original_last_states(self) -> list[np.ndarray]:
        hidden: list[np.ndarray] = []
        for _, _, hidden in stream(self._source, self._windows.tokens, batch_size=self._batch_size):  # noqa: B007
            pass
        return hidden


@functools.partial(jax.jit, static_argnames=("config", "needs", "rows"))
def _head_statistics(config: ModelConfig, head_params: Params, h: jax.Array, needs: frozenset[str], rows: int):
    x = head_input(config, head_params, h)
    return reduce_inputs(x.reshape(-1, x.shape[-1]), needs, rows=rows)


class _Embedding(ParameterSource):
    """The embedding alone."""

    def __init__(self, config: ModelConfig, params: Params):
        self.config, self._params = config, params

    def part(self, name: str, dtype=None) -> Params:
        if name != "embed":
            raise KeyError(name)
        return self._params


def stored_dtype(stored: Params):
    """That of a block's norms, bfloat16 for float32."""
    dtype = stored["attention_norm"]["scale"].dtype
    return dtype if dtype.itemsize == 2 else DENSE_DTYPE


def as_stored(packed: Params, stored: Params) -> Params:
    """What is dense in `packed` in the dtype it has in `stored`, float32 rounded to bfloat16."""

    def rounded(leaf, original):
        if is_packed(leaf):
            return leaf
        return leaf.astype(original.dtype if original.dtype.itemsize == 2 else DENSE_DTYPE)

    return jax.tree.map(rounded, packed, stored, is_leaf=is_packed)
