"""Seconds and memory of quantizing one block, by method and stage, and what that makes for the whole model.

    python -m experiments.quantizers.cost
    python -m experiments.quantizers.cost --methods gptq,rtn --scale 4 --tokens 8192 --json cost.json

Weights are random and so are the inputs, correlated and of uneven energy: what is measured does not depend on them. The
stages are those of `lq quantize`, for every quantizer that works matrix by matrix:

    statistics   what the method needs of the inputs of the matrices, all tokens, a batch of windows at a time
    prepare      what of them serves all matrices that read the same inputs, such as the factor of GPTQ
    codes        the seven matrices, packed

Running the model on the calibration tokens is not among them; it costs every method the same. The first run compiles,
the second does not. Each method runs in a process of its own, so that its peak memory is its own.

Defaults: 128 windows of 2048 tokens on an accelerator, one of 1024 and a quarter of all widths on a CPU.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lq.calibration.statistics import InputStats, reduce_inputs
from lq.numerics.spec import QuantSpec
from lq.quantizers import QUANTIZERS, quantize_matrix
from lq.runs.environment import device_name, peak_memory_bytes, versions

BATCH = 8192  # tokens that are there at once
STAGES = ("statistics", "prepare", "codes")


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


SHAPES = {
    "llama3_8b": Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, blocks=32),
    "llama3_1b": Shape(hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64, blocks=16),
    "llama3_70b": Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, blocks=80),
}


def matrix_methods() -> list[str]:
    """Quantizers that take a matrix after the other."""
    return [name for name, method in QUANTIZERS.items() if method.block is None]


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


def quantize(block: Block, name: str, spec: QuantSpec) -> dict[str, float]:
    """Seconds of each stage of one method over one block."""
    method = QUANTIZERS[name]
    options = QUANTIZERS.options(name, {})
    seconds = {}

    def timed(stage: str, function) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds[stage] = time.perf_counter() - start
        return result

    prepare = method.prepare or (lambda stats, options: stats)
    found = timed("statistics", lambda: block.statistics(method.needs - {"calibration"}))
    prepared = timed("prepare", lambda: [None if s is None else prepare(s, options) for s in found])

    def codes():
        for matrices, of_input in zip(block.weights, prepared, strict=True):
            for path, weight in matrices.items():
                fitting = options if method.per_matrix is None else method.per_matrix(options, path)
                jax.block_until_ready(quantize_matrix(weight, of_input, spec, name, fitting))

    timed("codes", codes)
    return seconds


def peak_bytes() -> int:
    """Of device memory on an accelerator, of the process on a CPU."""
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else peak_memory_bytes()


def measure(name: str, shape: Shape, tokens: int, spec: QuantSpec) -> dict[str, Any]:
    block = Block(shape, tokens)
    first, second = (quantize(block, name, spec) for _ in range(2))
    total = sum(second.values())
    return {
        "first_seconds": first,
        "second_seconds": second,
        "block_seconds": total,
        "model_seconds": sum(first.values()) + (shape.blocks - 1) * total,
        "peak_bytes": peak_bytes(),
    }


def in_a_process_of_its_own(name: str, given: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.quantizers.cost", *given, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    shape = Shape(**result["shape"])
    head = [*STAGES, "block", "peak GB", f"{shape.blocks} blocks"]
    lines = [
        f"{result['device']}: one block of {result['model']} (hidden {shape.hidden}, intermediate "
        f"{shape.intermediate}), {result['tokens']} tokens, {result['spec']}. Seconds",
        f"{'method':12}{'run':8}" + "".join(f"{title:>12}" for title in head),
    ]
    for name, found in result["methods"].items():
        if "error" in found:
            lines.append(f"{name:12}{found['error']}")
            continue
        for run in ("first", "second"):
            seconds = found[f"{run}_seconds"]
            cells = [f"{number:12.2f}" for number in (*map(seconds.get, STAGES), sum(seconds.values()))]
            if run == "second":
                cells += [f"{found['peak_bytes'] / 1e9:12.2f}", f"{found['model_seconds']:12.0f}"]
            lines.append(f"{name:12}{run:8}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3_8b")
    parser.add_argument("--methods", help="comma-separated; all that work matrix by matrix")
    parser.add_argument("--tokens", type=int, help="of calibration text")
    parser.add_argument("--scale", type=int, help="divides all widths")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.methods.split(",") if given.methods else matrix_methods()
    if unknown := [name for name in names if name not in matrix_methods()]:
        parser.error(f"{unknown[0]}: write one or more of {', '.join(matrix_methods())}")

    spec = QuantSpec(bits=given.bits, group_size=given.group_size)
    if given.one is None:
        found = {name: in_a_process_of_its_own(name, sys.argv[1:]) for name in names}
    on_cpu = jax.default_backend() == "cpu"
    shape = SHAPES[given.shape].divided(given.scale or (4 if on_cpu else 1))
    tokens = given.tokens or (1024 if on_cpu else 128 * 2048)
    if given.one is not None:
        print(json.dumps(measure(given.one, shape, tokens, spec)))
        return
    result = {
        "device": device_name(),
        "versions": versions(),
        "model": given.shape,
        "shape": dataclasses.asdict(shape),
        "tokens": tokens,
        "spec": str(spec),
        "methods": found,
    }
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
