"""Tokens per second of `lq generate`: dense in bfloat16 and float32, and packed at several widths, in one run.

    python -m experiments.decoding.measure --out experiments/decoding/measured

Two models: the shipped one, and one of the shape of Llama 3.2 1B with random weights, quantized by plain rounding. Each
row decodes one prompt greedily after a first call that compiles; the time is that of the whole call, prompt included.
Rows are visited in turn, round after round, so that what else the machine does falls on all alike.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lq
from lq.atomic import write_text
from lq.models.config import BlockKind, ModelConfig, Rope
from lq.models.decoder import Decoder, abstract_params
from lq.models.matrices import EMBEDDING
from lq.models.prepared import prepared_nbytes
from lq.runs.environment import device_name, versions

PROMPT = list(range(1, 33))


def llama_1b() -> ModelConfig:
    """The shape of Llama 3.2 1B, without its long-context rope scaling."""
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_positions=4096,
        kinds=(BlockKind(rope=Rope(theta=500_000.0, rotary_dim=64)),) * 16,
        query_scale=64**-0.5,
        norm_eps=1e-5,
        tie_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(),
    )


def random_params(config: ModelConfig):
    """bfloat16, small enough for activations to stay finite."""
    shapes = abstract_params(config)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = jax.jit(
        lambda key, leaf: (jax.random.normal(key, leaf.shape, jnp.float32) * 0.02).astype(jnp.bfloat16),
        static_argnums=1,
    )
    return jax.tree.unflatten(structure, [draw(k, leaf) for k, leaf in zip(keys, leaves, strict=True)])


@dataclasses.dataclass(frozen=True)
class Row:
    """How the parameters are stored: dense in `dtype`, or packed at `bits`."""

    name: str
    bits: int | None = None
    dtype: str = "bfloat16"
    head_bits: int | None = None  # the embedding, which is the head too

    def params(self, model: Decoder, params):
        if self.bits is None:
            return jax.tree.map(lambda a: a.astype(self.dtype), params)
        plan = lq.uniform_plan(model.config, lq.QuantSpec(bits=self.bits))
        if self.head_bits is not None:
            plan = dataclasses.replace(plan, specs={**plan.specs, EMBEDDING: lq.QuantSpec(bits=self.head_bits)})
        return lq.prepare(lq.quantize(model, params, plan, options={"clip": "none"}))


ROWS = [
    Row("bf16"),
    Row("f32", dtype="float32"),
    Row("W8", 8),
    Row("W4", 4),
    Row("W3", 3),
    Row("W2", 2),
    Row("W4, head W8", 4, head_bits=8),
]


def measure(name: str, model: Decoder, params, tokens: int, rounds: int, rows: list[Row]) -> list[dict]:
    """A result for each row, in order."""
    stored = {row.name: row.params(model, params) for row in rows}
    decode = lambda p: lq.generate(model, p, [PROMPT], max_new_tokens=tokens, stop_ids=())  # noqa: E731
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for i in range(rounds + 1):
        for row in rows:
            start = time.perf_counter()
            decode(stored[row.name])
            if i:
                seconds[row.name].append(time.perf_counter() - start)
        print(f"{name}: round {i} of {rounds}", file=sys.stderr, flush=True)
    rates = {row.name: tokens / statistics.median(seconds[row.name]) for row in rows}
    return [
        {
            "model": name,
            "row": row.name,
            "tokens_per_second": rates[row.name],
            "over_bf16": rates[row.name] / rates["bf16"],
            "bytes_of_all_weights": sum(leaf.nbytes for leaf in jax.tree.leaves(stored[row.name])),
            "bytes_laid_out": prepared_nbytes(stored[row.name]),
            "seconds": seconds[row.name],
        }
        for row in rows
    ]


def table(results: list[dict]) -> str:
    lines = ["| model | weights | all weights, MB | tokens/s | against bf16 |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['model']} | {r['row']} | {r['bytes_of_all_weights'] / 1e6:.0f} | {r['tokens_per_second']:.2f} "
        f"| {r['over_bf16']:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    compute = jnp.bfloat16
    standin, params, _ = lq.load("standin")
    results = measure("shipped", Decoder(standin.config, compute), params, 64, options.rounds, ROWS)
    config = llama_1b()
    results += measure("1B, random", Decoder(config, compute), random_params(config), 16, options.rounds, ROWS)
    content = {
        "device": device_name(),
        "versions": versions(),
        "compute_dtype": np.dtype(compute).name,
        "prompt_tokens": len(PROMPT),
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "decoding.json", json.dumps(content, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
