"""Trains the stand-in model, a 16-block Llama of 10.5 million parameters, or its control, on Python sources.

    python -m experiments.standin.train --out DIR [--model narrow] [--steps 2400]

Claims: validation perplexity below a third of the unigram perplexity. Costs about an hour and a half on two CPU cores.
Interrupt it at any time; the same command resumes from the last checkpoint, and the batches are a function of the step
alone, so the run is the same as an uninterrupted one. `python -m experiments.standin.export --run DIR` then writes the
model in Hugging Face layout.

`narrow` is of another shape and another seed, half the size, trained in float32 where the other multiplies matrices in
bfloat16, with the tokenizer of the model that ships: what was found on one model is tried on the other.

The rate rises for 100 steps and then falls linearly to zero ("straight to zero", arXiv 2502.15938).
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

if "XLA_FLAGS" not in os.environ:  # XLA's CPU backend runs two single-threaded devices faster than one with two threads
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={os.cpu_count()}"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.standin.corpus import documents
from lq.assets import ASSETS
from lq.models.config import BlockKind, ModelConfig, Rope
from lq.models.decoder import Decoder
from lq.models.layers import unboxed

VOCAB, LENGTH, BATCH = 4096, 512, 8
PEAK_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 100, 0.1
END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Model:
    config: ModelConfig
    seed: int  # of initialization and batches
    tokenizer: Path | None = None  # trained on the text when None
    dtype: Any = jnp.bfloat16  # of matrix products


def llama(*, blocks: int, width: int, heads: int, kv_heads: int, feed_forward: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        max_positions=LENGTH,
        kinds=(BlockKind(rope=Rope(theta=10_000.0, rotary_dim=64)),) * blocks,
        query_scale=64**-0.5,
        norm_eps=1e-5,
        tie_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


MODELS = {
    "standin": Model(llama(blocks=16, width=256, heads=4, kv_heads=2, feed_forward=512), seed=0),
    "narrow": Model(
        llama(blocks=12, width=192, heads=3, kv_heads=1, feed_forward=576),
        seed=1,
        dtype=jnp.float32,
        tokenizer=ASSETS / "standin" / "tokenizer.json",
    ),
}


def train_tokenizer(texts: list[str], path: Path):
    """Byte-level BPE (GPT-2's pre-tokenization) with one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


def prepare(out: Path, tokenizer: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Token streams of the training and evaluation splits, made once and kept in `out`, with their tokenizer."""
    from tokenizers import Tokenizer

    out.mkdir(parents=True, exist_ok=True)
    files, path = {split: out / f"{split}.npy" for split in ("train", "evaluation")}, out / "tokenizer.json"
    if tokenizer is not None and path.exists() and path.read_bytes() != tokenizer.read_bytes():
        raise SystemExit(f"train: {path} is not {tokenizer}, which this model has; give another --out")
    if not all(f.exists() for f in files.values()):
        everything = list(documents())
        texts = {split: [d.text for d in everything if d.split == split] for split in files}
        if tokenizer is not None:
            shutil.copyfile(tokenizer, path)
        by = Tokenizer.from_file(str(path)) if path.exists() else train_tokenizer(texts["train"], path)
        for split, file in files.items():
            encoded = by.encode_batch(texts[split])
            stream = np.concatenate([np.asarray([0, *e.ids], np.uint16) for e in encoded])
            print(
                f"{split}: {len(encoded)} files, {sum(map(len, texts[split])) / 1e6:.1f} MB, {stream.size} tokens",
                flush=True,
            )
            np.save(file, stream)
    return np.load(files["train"], mmap_mode="r"), np.load(files["evaluation"], mmap_mode="r")


def batch_at(stream: np.ndarray, step: int, seed: int) -> np.ndarray:
    """`[BATCH, LENGTH + 1]` random windows, a function of step and seed alone."""
    starts = np.random.default_rng([17 + seed, step]).integers(0, stream.size - LENGTH - 1, BATCH)
    return np.stack([stream[s : s + LENGTH + 1] for s in starts]).astype(np.int32)


def unigram_perplexity(train: np.ndarray, held_out: np.ndarray) -> float:
    """Perplexity of the training split's token frequencies (add-one) on the held-out split."""
    counts = np.bincount(train, minlength=VOCAB) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[held_out].mean()))


def schedule(steps: int):
    rise = optax.linear_schedule(0.0, PEAK_RATE, WARMUP)
    return optax.join_schedules([rise, optax.linear_schedule(PEAK_RATE, 0.0, steps - WARMUP)], [WARMUP])


def optimizer(steps: int):
    def decayed(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(schedule(steps), b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def loss_fn(model: Model, params, tokens):
    """Mean cross-entropy in nats; all but matrix products in float32."""
    logits = Decoder(model.config, dtype=model.dtype).apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def initialize(config: ModelConfig, key):
    """Normal(0.02) weights, the two that write to the residual stream scaled by 1/sqrt(2 blocks) (GPT-2)."""
    params = unboxed(Decoder(config).init(key, jnp.zeros((1, 8), jnp.int32))["params"])

    def scale(path, leaf):
        names = {getattr(k, "key", None) for k in path}
        return leaf / (2 * config.num_blocks) ** 0.5 if names & {"o_proj", "down_proj"} else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def shards(devices: int) -> int:
    """The most of `devices` among which a batch can be dealt out evenly."""
    return max(n for n in range(1, devices + 1) if BATCH % n == 0)


def train(model: Model, out: Path, steps: int, evaluate_every: int) -> None:
    stream, held_out = prepare(out, model.tokenizer)
    mesh = Mesh(np.asarray(jax.devices()[: shards(jax.device_count())]), ("data",))
    rows, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    tx, loss_of = optimizer(steps), functools.partial(loss_fn, model)

    @jax.jit
    def update(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_of)(params, tokens)
        change, state = tx.update(grads, state, params)
        return optax.apply_updates(params, change), state, loss

    held_out_loss = jax.jit(loss_of)
    windows = held_out[: held_out.size // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1).astype(np.int32)
    windows = windows[:: max(1, len(windows) // 64)][:64]

    params = jax.jit(functools.partial(initialize, model.config))(jax.random.key(model.seed))
    params = jax.device_put(params, replicated)
    state = jax.device_put(jax.jit(tx.init)(params), replicated)
    manager = ocp.CheckpointManager(out.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    first = 0
    if manager.latest_step() is not None:
        first = manager.latest_step()
        restored = manager.restore(first, args=ocp.args.StandardRestore({"params": params, "state": state}))
        params, state = restored["params"], restored["state"]
        print(f"resumed at step {first}", flush=True)
    curve = out / "curve.jsonl"
    if first == 0:
        curve.write_text(json.dumps({"unigram_perplexity": unigram_perplexity(stream, held_out)}) + "\n")

    started, losses = time.time(), []
    for step in range(first, steps):
        tokens = jax.device_put(batch_at(stream, step, model.seed), rows)
        params, state, loss = update(params, state, tokens)
        losses.append(loss)
        done = step + 1
        if done % evaluate_every == 0 or done == steps:
            chunks = [jax.device_put(windows[i : i + BATCH], rows) for i in range(0, len(windows), BATCH)]
            validation = float(np.mean([held_out_loss(params, c) for c in chunks]))
            row = {
                "step": done,
                "tokens": done * BATCH * LENGTH,
                "train_loss": float(np.mean(jax.device_get(losses))),
                "validation_perplexity": float(np.exp(validation)),
                "seconds_per_step": (time.time() - started) / (done - first),
            }
            losses = []
            with curve.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            manager.save(done, args=ocp.args.StandardSave({"params": params, "state": state}))
    manager.wait_until_finished()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="run directory: token streams, checkpoints, curve")
    parser.add_argument("--model", choices=MODELS, default="standin")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--evaluate-every", type=int, default=100)
    args = parser.parse_args()
    train(MODELS[args.model], args.out, args.steps, args.evaluate_every)


if __name__ == "__main__":
    main()
