"""One decoding step of a Llama-shaped model with random weights: tokens per second in bfloat16 and packed.

The model is written out in plain JAX, with a dense bfloat16 key/value cache and a bfloat16 head, so that what differs
between two runs is the block's matrices alone. The projections that share their input (q, k, v; gate, up) are one call.
Steps run in a loop on the device, as decoding does; the time of one is the difference between a long and a short loop.
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax import Array, lax

from lq_kernels import PackedMatrix, prepare, quantized_matmul
from lq_kernels.packing import plane_widths, words_along

GROUP = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """Llama 3 8B's when nothing else is said."""

    blocks: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    hidden: int = 14336
    vocabulary: int = 128256

    def matrices(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (input channels, output channels of each matrix that shares them)."""
        kv = self.kv_heads * self.head
        return {
            "qkv": (self.width, (self.heads * self.head, kv, kv)),
            "o": (self.heads * self.head, (self.width,)),
            "gate_up": (self.width, (self.hidden, self.hidden)),
            "down": (self.hidden, (self.width,)),
        }


LLAMA_3_8B = Shape()


def random_matrix(key: Array, K: int, N: int, bits: int) -> PackedMatrix:
    """`bits` + 32 / 128 bits per weight: a bfloat16 scale and a 16-bit zero point for every 128 weights."""
    keys = jax.random.split(key, len(plane_widths(bits)) + 1)
    groups = K // GROUP
    return PackedMatrix(
        planes=tuple(
            jax.random.bits(k, (words_along(K, p), N), jnp.uint32)
            for k, p in zip(keys, plane_widths(bits), strict=False)
        ),
        scales=jnp.full((groups, N), 0.02 / 2**bits, jnp.bfloat16),
        zeros=jax.random.randint(keys[-1], (groups, N), 0, 2**bits).astype(jnp.uint16),
        zero_point=0.0,
        bits=bits,
        group_size=GROUP,
        in_features=K,
    )


def random_model(shape: Shape, bits: int | None, backend: str | None) -> dict:
    """`bits` None: bfloat16. Packed matrices are prepared for `backend`."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * shape.blocks + 1))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def dense(key, K, N):
        return (jax.random.normal(key, (K, N), jnp.bfloat16) * K**-0.5).astype(jnp.bfloat16)

    def weights(K, outputs):
        key = next(keys)
        if bits is None:
            return dense(key, K, sum(outputs))
        parts = [
            random_matrix(k, K, n, bits) for k, n in zip(jax.random.split(key, len(outputs)), outputs, strict=True)
        ]
        return prepare(parts, backend=backend)

    blocks = [{name: weights(*sizes) for name, sizes in shape.matrices().items()} for _ in range(shape.blocks)]
    table = dense(next(keys), shape.vocabulary, shape.width)
    return {"blocks": blocks, "embedding": table, "head": table.T + 0}


def apply(x: Array, w, outputs: tuple[int, ...], backend: str | None, interpret: bool) -> tuple[Array, ...]:
    if isinstance(w, jax.Array):
        ends = [sum(outputs[: i + 1]) for i in range(len(outputs) - 1)]
        return tuple(jnp.split(x @ w, ends, axis=-1))
    return quantized_matmul(x, w, backend=backend, interpret=interpret)


def norm(x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def rotate(x: Array, position: Array) -> Array:
    """x `[batch, heads, head]` turned by its position, in halves."""
    half = x.shape[-1] // 2
    angle = position * 500_000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    ).astype(x.dtype)


def attend(q: Array, cache: dict, position: Array) -> Array:
    """q `[batch, heads, head]` over keys and values `[batch, kv_heads, length, head]` up to `position`."""
    batch, heads, head = q.shape
    keys, values = cache["k"], cache["v"]
    q = q.reshape(batch, keys.shape[1], -1, head)
    scores = jnp.einsum("bghc,bgtc->bght", q, keys, preferred_element_type=jnp.float32) * head**-0.5
    scores = jnp.where(jnp.arange(keys.shape[2]) <= position, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(values.dtype)
    return jnp.einsum("bght,bgtc->bghc", weights, values).reshape(batch, heads * head)


def step(shape: Shape, model: dict, caches: list, token: Array, position: Array, backend, interpret):
    """token int32 `[batch]` -> (the likeliest next token, caches)."""
    x = model["embedding"][token]
    run = functools.partial(apply, backend=backend, interpret=interpret)
    sizes = {name: outputs for name, (_, outputs) in shape.matrices().items()}
    new_caches = []
    for block, cache in zip(model["blocks"], caches, strict=True):
        q, k, v = run(norm(x), block["qkv"], sizes["qkv"])
        heads = lambda a: a.reshape(a.shape[0], -1, shape.head)  # noqa: E731
        put = lambda old, new: lax.dynamic_update_slice(old, new[:, :, None], (0, 0, position, 0))  # noqa: E731
        cache = {"k": put(cache["k"], rotate(heads(k), position)), "v": put(cache["v"], heads(v))}
        x = x + run(attend(rotate(heads(q), position), cache, position), block["o"], sizes["o"])[0]
        gate, up = run(norm(x), block["gate_up"], sizes["gate_up"])
        x = x + run(jax.nn.silu(gate) * up, block["down"], sizes["down"])[0]
        new_caches.append(cache)
    logits = jnp.matmul(norm(x), model["head"], preferred_element_type=jnp.float32)
    return jnp.argmax(logits, -1).astype(jnp.int32), new_caches


def time_decoding(
    shape: Shape, bits: int | None, backend: str | None, *, batch=1, context=1024, steps=32, repeats=5, interpret=False
) -> dict:
    """Milliseconds of one step, tokens per second, bytes of the blocks' matrices, seconds to compile."""
    model = random_model(shape, bits, backend)
    size = (batch, shape.kv_heads, context, shape.head)
    caches = [{"k": jnp.zeros(size, jnp.bfloat16), "v": jnp.zeros(size, jnp.bfloat16)} for _ in range(shape.blocks)]

    @jax.jit
    def decode(model, caches, count):
        def one(i, carry):
            token, caches = carry
            return step(shape, model, caches, token, context // 2 + i, backend, interpret)

        return lax.fori_loop(0, count, one, (jnp.zeros((batch,), jnp.int32), caches))

    start = time.perf_counter()
    program = decode.lower(model, caches, jnp.int32(0)).compile()
    compiling = time.perf_counter() - start

    def seconds(count):
        start = time.perf_counter()
        jax.block_until_ready(program(model, caches, jnp.int32(count)))
        return time.perf_counter() - start

    seconds(1)
    differences = [seconds(2 * steps) - seconds(steps) for _ in range(repeats)]
    each = statistics.median(differences) / steps
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model["blocks"]))
    weights = shape.blocks * sum(K * sum(outputs) for K, outputs in shape.matrices().values())
    return {
        "bits": bits,
        "batch": batch,
        "context": context,
        "milliseconds": each * 1e3,
        "tokens_per_second": batch / each,
        "block_bytes": nbytes,
        "bits_per_weight_on_device": 8 * nbytes / weights,
        "temporary_bytes": getattr(program.memory_analysis(), "temp_size_in_bytes", None),
        "compile_seconds": compiling,
    }
