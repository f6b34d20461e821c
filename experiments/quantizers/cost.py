"""Seconds and memory of quantizing one block, by method and stage, and what that makes for the whole model.

    python -m experiments.quantizers.cost
    python -m experiments.quantizers.cost --methods gptq,rtn --samples 4 --length 2048 --json cost.json

What is timed is the source of packed blocks that `lq quantize` reads: `PlannedSource` for RTN and HQQ, which need no
text, and `QuantizedStream` for all others, which carries the calibration states on. Everything that a block costs there
is counted, by stage:

    scales          AWQ's search for channel scales
    token weights   RSQ's, by attention
    statistics      the block run up to the inputs of its matrices, and their reductions; GPTQ does it for each of the
                    four inputs, the matrices before it quantized
    factors         of the second moments (GPTQ, RSQ, BAQ)
    errors          of learned rounding: those of its start and result on all windows, and the codes of both
    steps           of its optimizer
    codes           the matrices rounded and packed, and what is in no other stage: the checks, and the output error
                    that GPTQ, RSQ and BAQ report of every matrix, two products with its second moment
    outputs         the block run on all windows, for the next block's states; twice where the original's are aimed at

Not counted: reading weights, writing packed ones and calibration states (`lq.checkpoint.states`), the embedding and the
head. Weights are random and so are the tokens. What is searched until it holds depends on them a little: how often a
Hessian is damped, when HQQ stops, and BAQ's widths, for which packing compiles anew where they are new.

Two blocks are quantized, one after the other. The second's seconds are those of a block; the first took longer by what
compiling takes, once a model. Each method runs in a process of its own, so that its peak memory is its own: that of
the device on an accelerator, of the process on a CPU.

Defaults: 128 windows of 2048 tokens and 200 steps on an accelerator; on a CPU two windows of 512 and 2 steps, each
counted as a hundred where the whole is estimated.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lq.allocation import uniform_plan
from lq.calibration.data import Windows
from lq.models.config import BlockKind, ModelConfig, Rope
from lq.models.matrices import block_shapes
from lq.models.source import InMemory, ParameterSource
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, PlannedSource, QuantizedStream, Recipe
from lq.quantizers.block import CalibratedBlock
from lq.registry import Method
from lq.runs.environment import device_name, peak_memory_bytes, versions

STEPS = 200  # of learned rounding, in the estimates
VOCABULARY = 8192  # rows of the embedding: as many different first states
TARGETS = {"gptq": 6.0, "autoround": 20.0}  # seconds a block of Llama-3-8B on an H200, with the defaults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder block with gated MLP, and how many of them the model has."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int

    def divided(self, scale: int) -> "Shape":
        """Every width over `scale`."""
        widths = {name: getattr(self, name) // scale for name in ("hidden", "intermediate", "head_dim")}
        return dataclasses.replace(self, **widths)

    def config(self) -> ModelConfig:
        """Of a model with such blocks, its embedding left small."""
        return ModelConfig(
            family="llama",
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_positions=8192,
            kinds=(BlockKind(rope=Rope(theta=500_000.0, rotary_dim=self.head_dim)),) * self.blocks,
            query_scale=self.head_dim**-0.5,
            norm_eps=1e-5,
            tie_embeddings=True,
            bos_token_id=None,
            eos_token_ids=(),
        )


SHAPES = {
    "llama3_8b": Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, blocks=32),
    "llama3_1b": Shape(hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64, blocks=16),
    "llama3_70b": Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, blocks=80),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is quantized with what text."""

    shape: Shape
    samples: int
    length: int
    steps: int  # that are run; STEPS are counted
    spec: QuantSpec

    @property
    def windows(self) -> Windows:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (self.samples, self.length), dtype=np.int32)
        return Windows(tokens, source="none", how="drawn at random")

    @property
    def of_targets(self) -> bool:
        """Whether `TARGETS` are set for this."""
        return (self.shape, self.samples, self.length, self.steps) == (SHAPES["llama3_8b"], 128, 2048, STEPS)

    def spec_of(self, name: str) -> QuantSpec:
        """The spec as a method can use it: BAQ chooses widths, HQQ zero points that are no codes."""
        if QUANTIZERS[name].segments is not None:
            return dataclasses.replace(self.spec, mixed=True)
        return dataclasses.replace(self.spec, zero_dtype="bfloat16") if name == "hqq" else self.spec


def workload(given: argparse.Namespace) -> Workload:
    on_cpu = jax.default_backend() == "cpu"
    return Workload(
        shape=SHAPES[given.shape].divided(given.scale),
        samples=given.samples or (2 if on_cpu else 128),
        length=given.length or (512 if on_cpu else 2048),
        steps=given.steps or (2 if on_cpu else STEPS),
        spec=QuantSpec(bits=given.bits, group_size=given.group_size),
    )


def random_model(config: ModelConfig) -> ParameterSource:
    """A model in bfloat16 all of whose blocks are one and the same random block."""
    shapes = block_shapes(config, config.kinds[0])
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 1))
    normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    leaves = {
        path: normal(next(keys), shape) if path.endswith("kernel") else jnp.ones(shape, jnp.bfloat16)
        for path, shape in shapes.items()
    }
    embedding = jax.jit(random_states, static_argnums=(1, 2))(next(keys), config.vocab_size, config.hidden_size)
    block, embed = unflatten_dict(leaves, sep="/"), {"tokens": {"embedding": embedding}}
    blocks = {f"block_{i}": block for i in range(config.num_blocks)}
    return InMemory(config, jax.block_until_ready({"embed": embed, **blocks}))


def random_states(key: jax.Array, tokens: int, channels: int) -> jax.Array:
    """bfloat16 `[tokens, channels]`: neighbouring channels correlate, energies are uneven."""
    of_noise, of_scales = jax.random.split(key)
    noise, scales = jax.random.normal(of_noise, (tokens, channels)), jax.random.normal(of_scales, (channels,))
    mixed = noise + 0.7 * jnp.roll(noise, 1, axis=1) + 0.4 * jnp.roll(noise, 5, axis=1)
    return (mixed * jnp.exp(scales)).astype(jnp.bfloat16)


class Clock:
    """Seconds by stage. All time belongs to the stage that was begun last, so that nothing is left out."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def begin(self, stage: str) -> str:
        """Ends a stage and begins another. Returns the one that ended."""
        now = time.perf_counter()
        ended = self._stage
        if ended:
            self._seconds[ended] = self._seconds.get(ended, 0.0) + now - self._since
        self._stage, self._since = stage, now
        return ended

    def stop(self) -> dict[str, float]:
        """What was counted since the last stop."""
        self.begin("")
        found, self._seconds = self._seconds, {}
        return found

    def timed(self, stage: str, function: Callable, then: str | None = None) -> Callable:
        """`function` as a stage, its arrays waited for; after it begins `then`, or what was before it goes on."""

        def as_stage(*args, **options):
            before = self.begin(stage)
            result = jax.block_until_ready(function(*args, **options))
            self.begin(then or before)
            return result

        return as_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedRecipe(Recipe):
    """A recipe whose quantizer tells a clock what it does."""

    clock: Clock = dataclasses.field(compare=False)

    @property
    def quantizer(self) -> Method:
        method, timed = super().quantizer, self.clock.timed
        block = method.block and functools.partial(method.block, on_steps=self._on_steps)
        return dataclasses.replace(
            method,
            prepare=method.prepare and timed("factors", method.prepare, then="codes"),
            token_weights=method.token_weights and timed("token weights", method.token_weights),
            block=block and timed("errors", block, then="codes"),
        )

    def _on_steps(self, done: int) -> None:
        self.clock.begin("steps" if done < self.options.steps else "errors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedBlock(CalibratedBlock):
    """A block that tells a clock when it is run."""

    clock: Clock

    def outputs(self, params, states=None):
        return self.clock.timed("outputs", super().outputs)(params, states)

    def statistics(self, params, which, needs, weights=None):
        return self.clock.timed("statistics", super().statistics, then="codes")(params, which, needs, weights)


class TimedStream(QuantizedStream):
    """A stream of `TimedBlock`s."""

    def __init__(self, *args, clock: Clock, **options):
        super().__init__(*args, **options)
        self._clock = clock

    def _calibrated_block(self):
        block, stored = super()._calibrated_block()
        fields = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
        return TimedBlock(**fields, clock=self._clock), stored


def quantize_two_blocks(name: str, work: Workload, note: Callable[[str], None]) -> list[dict[str, float]]:
    """Seconds of each stage, of the first block and of the second."""
    config, clock = work.shape.config(), Clock()
    options = QUANTIZERS.options(name, {"steps": work.steps} if QUANTIZERS[name].block else {})
    recipe = TimedRecipe(method=name, options=options, clock=clock)
    what = random_model(config), uniform_plan(config, work.spec_of(name)).specs, recipe
    if recipe.calibrated:
        packed = TimedStream(*what, work.windows, note=note, clock=clock)
        packed.chains()  # the first states come of the embedding, which is no part of a block
    else:
        packed = PlannedSource(*what)
    found = []
    for index in range(2):
        clock.begin("codes" if recipe.scaling is None else "scales")
        jax.block_until_ready(packed.block(index))
        found.append(clock.stop())
    return found


def peak_bytes() -> int:
    """Of device memory on an accelerator, of the process on a CPU."""
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else peak_memory_bytes()


def measure(name: str, work: Workload) -> dict[str, Any]:
    """All of a method, as JSON; `uncounted_seconds` are those of steps that were not run."""
    notes: list[str] = []
    first, second = quantize_two_blocks(name, work, notes.append)
    compiling = max(0.0, sum(first.values()) - sum(second.values()))
    uncounted = second.get("steps", 0.0) * (STEPS / work.steps - 1)
    seconds, device = sum(second.values()) + uncounted, device_name()
    return {
        "first_seconds": first,
        "second_seconds": second,
        "uncounted_seconds": uncounted,
        "block_seconds": seconds,
        "compiling_seconds": compiling,
        "model_seconds": compiling + work.shape.blocks * seconds,
        "target_seconds": TARGETS.get(name) if "H200" in device and work.of_targets else None,
        "peak_bytes": peak_bytes(),
        "device": device,
        "work": dataclasses.asdict(work) | {"spec": str(work.spec_of(name)), "steps_counted": STEPS},
        "notes": notes,
    }


def in_a_process_of_its_own(name: str, given: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.quantizers.cost", *given, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def heading(model: str, found: dict[str, Any]) -> str:
    """Two lines that say what was measured, and what the columns of `row` are."""
    work = found["work"]
    shape = Shape(**work["shape"])
    columns = ("s, block", "compiling", f"s, {shape.blocks}", "peak GB")
    return (
        f"{found['device']}: one block of {model} (hidden {shape.hidden}, intermediate {shape.intermediate}), "
        f"{work['samples']} x {work['length']} tokens\n"
        f"{'method':12}{''.join(f'{column:>10}' for column in columns)}  of the block"
    )


def row(name: str, found: dict[str, Any]) -> str:
    """A method's numbers, its target where there is one, and its stages."""
    if "error" in found:
        return f"{name:12}{found['error']}"
    numbers = (found["block_seconds"], found["compiling_seconds"], found["model_seconds"], found["peak_bytes"] / 1e9)
    stages = dict(found["second_seconds"])
    if "steps" in stages:
        stages["steps"] += found["uncounted_seconds"]
    said = [", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()), found["work"]["spec"]]
    if found["uncounted_seconds"]:
        said.append(f"{found['work']['steps']} of {STEPS} steps were run, the others are estimated")
    if (target := found["target_seconds"]) is not None:
        said.append(f"target {target:g} s: {'met' if found['block_seconds'] <= target else 'missed'}")
    return f"{name:12}{''.join(f'{number:10.2f}' for number in numbers)}  {'; '.join(said)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3_8b")
    parser.add_argument("--methods", default=",".join(QUANTIZERS), help="comma-separated; all when not given")
    parser.add_argument("--samples", type=int, help="windows of calibration text")
    parser.add_argument("--length", type=int, help="tokens of a window")
    parser.add_argument("--steps", type=int, help=f"of learned rounding that are run; {STEPS} are counted")
    parser.add_argument("--scale", type=int, default=1, help="divides all widths")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.methods.split(",")
    if unknown := [name for name in names if name not in QUANTIZERS]:
        parser.error(f"{unknown[0]}: write one or more of {', '.join(QUANTIZERS)}")

    if given.one is not None:
        print(json.dumps(measure(given.one, workload(given))))
        return
    # This process must not touch the device: it belongs to one of the others at a time.
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        found = in_a_process_of_its_own(name, sys.argv[1:])
        if "device" in found and not any("device" in other for other in methods.values()):
            print(heading(given.shape, found))
        print(row(name, found), flush=True)
        methods[name] = found
        if given.json:  # as far as it is: the next may take long
            result = {"versions": versions(), "model": given.shape, "methods": methods}
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
