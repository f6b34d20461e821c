"""Streaming: the numbers of the whole model, one block at a time, in memory that does not grow with depth."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config, random_params, write_directory

from lq.calibration.stream import stream
from lq.errors import UserError
from lq.models.config import BlockKind, Rope
from lq.models.decoder import Decoder, head
from lq.models.source import InMemory, ParameterSource

TESTS = Path(__file__).parent.parent


def test_streaming_gives_the_logits_of_the_whole_model():
    config = llama_config(3)
    params = random_params(config, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(1, 4096, (5, 20)).astype(np.int32)
    for _, _, hidden in stream(InMemory(config, params), tokens, batch_size=2):  # noqa: B007
        pass
    streamed = head(config, params, jnp.asarray(np.concatenate(hidden)))
    whole = Decoder(config).apply({"params": params}, tokens)
    np.testing.assert_allclose(np.asarray(streamed), np.asarray(whole), atol=1e-5 * float(np.abs(whole).max()))


def test_measurements_come_reduced_per_batch():
    config = llama_config(2)
    source = InMemory(config, random_params(config))
    tokens = np.ones((5, 4), np.int32)
    for index, measured, hidden in stream(source, tokens, batch_size=2, measure=lambda h, out: (h + out).sum((1, 2))):
        assert [m.shape for m in measured] == [(2,), (2,), (1,)]
        assert [h.shape for h in hidden] == [(2, 4, 64), (2, 4, 64), (1, 4, 64)]
        assert index in (0, 1)


def test_one_block_is_held_at_a_time():
    """Before a block is read, nothing keeps the one before it alive."""
    config = llama_config(4)
    params = random_params(config)
    alive = []

    class Watched(ParameterSource):
        def __init__(self):
            self.config = config

        def part(self, name, dtype=None):
            alive[:] = [ref for ref in alive if ref() is not None]
            assert len(alive) <= 1, f"{len(alive)} blocks are held when {name} is read"
            copied = jax.tree.map(jnp.array, params[name])
            if name.startswith("block_"):
                alive.append(weakref.ref(copied["mlp"]["up_proj"]["kernel"]))
            return copied

    for _ in stream(Watched(), np.ones((1, 4), np.int32)):
        pass


def test_tokens_and_windows_the_model_cannot_take_are_refused():
    source = InMemory(llama_config(1), random_params(llama_config(1)))
    with pytest.raises(UserError, match="token 4096: the model's vocabulary ends at 4095; the tokenizer is of another"):
        next(stream(source, np.full((1, 4), 4096, np.int32)))
    with pytest.raises(UserError, match="batch_size: 0; write 1 or more"):
        next(stream(source, np.ones((1, 4), np.int32), batch_size=0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"learned_position_offset": 2}, {"kinds": (BlockKind(rope=Rope(rotary_dim=16), window=4),)}],
    ids=["rope", "learned", "sliding"],
)
def test_windows_beyond_the_context_are_refused_whatever_the_positions(changes):
    config = dataclasses.replace(llama_config(1), max_positions=8, **changes)
    source = InMemory(config, random_params(config))
    next(stream(source, np.ones((1, 8), np.int32)))
    with pytest.raises(UserError, match="window of 9 tokens: the model's context is 8; write a smaller window"):
        next(stream(source, np.ones((1, 9), np.int32)))


@pytest.mark.once
def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """Twelve blocks more of the same width do not show: keeping them would cost twelve blocks.

    The allocator is told to give freed memory back at once, and a block (10.6 MB) is made larger than what peaks of
    equal runs were still seen to differ by (5 MB of 330).
    """
    eager = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {}
    for blocks in (12, 24):
        config = llama_config(blocks, hidden=768)
        path = write_directory(tmp_path / str(blocks), config, random_params(config))
        script = f"""
            from lq.allocation import uniform_plan
            from lq.checkpoint import write_quantized
            from lq.models.loading import open_checkpoint
            from lq.numerics.spec import QuantSpec
            from lq.quantizers import QUANTIZERS, PlannedSource, Recipe
            from lq.runs.environment import peak_memory_bytes
            source = open_checkpoint({str(path)!r})
            plan = uniform_plan(source.config, QuantSpec(bits=3))
            packed = PlannedSource(source, plan.specs, Recipe(options=QUANTIZERS.options("rtn", {{"clip": "none"}})))
            write_quantized(packed, plan, {str(tmp_path / f"q{blocks}")!r}, quantizer={{}}, description=source.path)
            print(peak_memory_bytes())
        """
        run = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | eager)
        peaks[blocks] = int(done.stdout)
    block = sum(leaf.nbytes for leaf in jax.tree.leaves(random_params(llama_config(1, hidden=768))["block_0"]))
    assert peaks[24] - peaks[12] <= block, peaks
