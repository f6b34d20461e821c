"""Seconds and memory of quantizing one block, by method and stage, and what that makes for the whole model.

    python -m experiments.quantizers.cost
    python -m experiments.quantizers.cost --methods gptq,rtn --samples 4 --length 2048 --json cost.json

Weights are random and so are the inputs, correlated and of uneven energy: what is measured does not depend on them. The
stages are those of `lq quantize`; for a quantizer that works matrix by matrix:

    statistics   what the method needs of the inputs of the matrices, all tokens, a batch of windows at a time
    prepare      what of them serves all matrices that read the same inputs, such as the factor of GPTQ
    codes        the seven matrices, packed

and for one that reconstructs the block:

    measure      the errors of the start and of the result on all windows, and the codes of both
    steps        of the optimizer, two windows each (its default), in bfloat16 on an accelerator and float32 on a CPU

Running the block on the calibration tokens is not among them (GPTQ does it for each of its four inputs, RTN and HQQ
never), nor are AWQ's search for scales, RSQ's weights of tokens and BAQ's widths. The first run compiles, the second
does not. Each method runs in a process of its own, so that its peak memory is its own.

Defaults: 128 windows of 2048 tokens and 200 steps on an accelerator; on a CPU two windows of 512 and 2 steps, each
counted as a hundred where the whole is estimated.
"""

import argparse
import dataclasses
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

from lq.calibration.statistics import InputStats, reduce_inputs
from lq.models.config import BlockKind, ModelConfig, Rope
from lq.models.matrices import block_matrices, block_shapes
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, quantize_matrix
from lq.quantizers.reconstruct import BlockFunction
from lq.runs.environment import device_name, peak_memory_bytes, versions

BATCH = 8192  # tokens that are there at once
STEPS = 200  # of learned rounding, in the estimates


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

    def inputs(self) -> list[tuple[int, dict[str, int]]]:
        """Each input of matrices: its channels, and path -> output channels of the matrices that read it."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, {"attention/q_proj": query, "attention/k_proj": key, "attention/v_proj": key}),
            (query, {"attention/o_proj": self.hidden}),
            (self.hidden, {"mlp/gate_proj": self.intermediate, "mlp/up_proj": self.intermediate}),
            (self.intermediate, {"mlp/down_proj": self.hidden}),
        ]

    def config(self) -> ModelConfig:
        """Of a model with such blocks, its embedding left small."""
        return ModelConfig(
            family="llama",
            vocab_size=1,
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


def random_inputs(key: jax.Array, tokens: int, channels: int) -> jax.Array:
    """bfloat16 `[tokens, channels]`: neighbouring channels correlate, energies are uneven."""
    of_noise, of_scales = jax.random.split(key)
    noise, scales = jax.random.normal(of_noise, (tokens, channels)), jax.random.normal(of_scales, channels)
    mixed = noise + 0.7 * jnp.roll(noise, 1, axis=1) + 0.4 * jnp.roll(noise, 5, axis=1)
    return (mixed * jnp.exp(scales)).astype(jnp.bfloat16)


@dataclasses.dataclass
class Block:
    """Random weights and inputs of one block. Inputs are a batch, which is counted as often as it takes."""

    shape: Shape
    tokens: int

    def __post_init__(self):
        self.batch = min(self.tokens, BATCH)
        draw = jax.jit(random_inputs, static_argnums=(1, 2))
        normal = jax.jit(lambda key, k, n: 0.02 * jax.random.normal(key, (k, n)), static_argnums=(1, 2))
        keys = iter(jax.random.split(jax.random.key(0), 16))
        self.inputs = [draw(next(keys), self.batch, channels) for channels, _ in self.shape.inputs()]
        self.weights = [
            {path: normal(next(keys), channels, outputs) for path, outputs in readers.items()}
            for channels, readers in self.shape.inputs()
        ]
        jax.block_until_ready((self.inputs, self.weights))

    def statistics(self, needs: frozenset[str]) -> list[InputStats | None]:
        if not needs:
            return [None] * len(self.inputs)
        return [self._accumulated(x, needs) for x in self.inputs]

    def _accumulated(self, x: jax.Array, needs: frozenset[str]) -> InputStats:
        rows = max(1, 512 * self.batch // self.tokens)
        total = reduce_batch(x, needs, rows)
        for _ in range(-(-self.tokens // self.batch) - 1):
            total = total + reduce_batch(x, needs, rows)
        return total


reduce_batch = jax.jit(lambda x, needs, rows: reduce_inputs(x, needs, rows=rows), static_argnums=(1, 2))


class Clock:
    """Seconds of what is called through it, added up by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        return result


def quantize_matrices(block: Block, name: str, spec: QuantSpec) -> dict[str, float]:
    """Seconds of each stage of a method that takes one matrix after the other."""
    method, options, clock = QUANTIZERS[name], QUANTIZERS.options(name, {}), Clock()
    prepare = method.prepare or (lambda stats, options: stats)
    found = clock("statistics", lambda: block.statistics(method.needs - {"calibration"}))
    prepared = clock("prepare", lambda: [None if s is None else prepare(s, options) for s in found])
    for matrices, of_input in zip(block.weights, prepared, strict=True):
        for path, weight in matrices.items():
            fitting = options if method.per_matrix is None else method.per_matrix(options, path)
            clock("codes", lambda: quantize_matrix(weight, of_input, spec, name, fitting))  # noqa: B023
    return clock.seconds


class DenseBlock:
    """The same block as a function, its windows and what it answers to them."""

    def __init__(self, shape: Shape, samples: int, length: int):
        config = shape.config()
        self.function = BlockFunction(config, config.kinds[0])
        self.params = self._params(config)
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        windows = jax.random.normal(jax.random.key(1), (samples, 1, length, shape.hidden), jnp.float32).astype(dtype)
        through = jax.jit(lambda params, windows: jax.lax.map(lambda h: self.function(params, h), windows))
        whole = (samples, length, shape.hidden)
        self.inputs = np.asarray(windows.reshape(whole))
        self.targets = np.asarray(through(self.params, windows).reshape(whole))

    def _params(self, config: ModelConfig):
        shapes = block_shapes(config, config.kinds[0])
        keys = jax.random.split(jax.random.key(0), len(shapes))
        draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape), static_argnums=1)
        leaves = {
            path: draw(key, shape) if path.endswith("kernel") else jnp.ones(shape)
            for key, (path, shape) in zip(keys, shapes.items(), strict=True)
        }
        return unflatten_dict(leaves, sep="/")


def reconstruct(block: DenseBlock, name: str, spec: QuantSpec, steps: int) -> dict[str, float]:
    """Seconds of each stage of a method that reconstructs the block."""
    options = QUANTIZERS.options(name, {"steps": steps})
    specs = dict.fromkeys(block_matrices(block.function.config, block.function.kind), spec)
    marks = [time.perf_counter()]
    found, _ = QUANTIZERS[name].block(
        block.function,
        block.params,
        block.inputs,
        block.targets,
        specs,
        options,
        on_steps=lambda done: marks.append(time.perf_counter()),
    )
    jax.block_until_ready(found)
    whole, learning = time.perf_counter() - marks[0], marks[-1] - marks[1]
    return {"measure": whole - learning, "steps": learning}


def peak_bytes() -> int:
    """Of device memory on an accelerator, of the process on a CPU."""
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else peak_memory_bytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is quantized with what text."""

    shape: Shape
    samples: int
    length: int
    steps: int  # that are run; STEPS are counted
    spec: QuantSpec


def workload(given: argparse.Namespace) -> Workload:
    on_cpu = jax.default_backend() == "cpu"
    return Workload(
        shape=SHAPES[given.shape].divided(given.scale),
        samples=given.samples or (2 if on_cpu else 128),
        length=given.length or (512 if on_cpu else 2048),
        steps=given.steps or (2 if on_cpu else STEPS),
        spec=QuantSpec(bits=given.bits, group_size=given.group_size),
    )


def measure(name: str, work: Workload) -> dict[str, Any]:
    """All of a method; `uncounted` seconds are those of steps that were not run."""
    uncounted = 0.0
    if QUANTIZERS[name].block is None:
        block = Block(work.shape, work.samples * work.length)
        first, second = (quantize_matrices(block, name, work.spec) for _ in range(2))
    else:
        dense = DenseBlock(work.shape, work.samples, work.length)
        first, second = (reconstruct(dense, name, work.spec, work.steps) for _ in range(2))
        uncounted = second["steps"] * (STEPS / work.steps - 1)
    seconds = sum(second.values()) + uncounted
    compiling = sum(first.values()) - sum(second.values())
    return {
        "first_seconds": first,
        "second_seconds": second,
        "block_seconds": seconds,
        "model_seconds": compiling + work.shape.blocks * seconds,
        "peak_bytes": peak_bytes(),
        "device": device_name(),
        "work": dataclasses.asdict(work) | {"spec": str(work.spec)},
    }


def in_a_process_of_its_own(name: str, given: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.quantizers.cost", *given, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(model: str, methods: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, found in methods.items():
        if "error" in found:
            lines.append(f"{name:12}{found['error']}")
            continue
        work = found["work"]
        shape = Shape(**work["shape"])
        if not lines:
            lines = [
                f"{found['device']}: one block of {model} (hidden {shape.hidden}, intermediate {shape.intermediate}), "
                f"{work['samples']} x {work['length']} tokens, {work['spec']}; {work['steps']} of {STEPS} steps run",
                f"{'method':12}{'s, block':>10}{'s, first':>10}{f's, {shape.blocks}':>10}{'peak GB':>10}  of the block",
            ]
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in found["second_seconds"].items())
        cells = (found["block_seconds"], sum(found["first_seconds"].values()), found["model_seconds"])
        numbers = "".join(f"{number:10.2f}" for number in (*cells, found["peak_bytes"] / 1e9))
        lines.append(f"{name:12}{numbers}  {stages}")
    return "\n".join(lines)


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
    methods = {name: in_a_process_of_its_own(name, sys.argv[1:]) for name in names}
    print(table(given.shape, methods))
    if given.json:
        result = {"versions": versions(), "model": given.shape, "methods": methods}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
