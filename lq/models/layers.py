"""The parts a decoder block is made of: linear map, norms, rotary positions, attention, feed-forward.

Shapes in this file: B batch, S query positions, T key positions, D hidden channels, H query heads, G key/value heads, C
head channels. A weight `kernel` is `[in, out]`. Norms, softmax and routing are computed in float32 or, where the
computation is in float64, in that.
"""

import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lq.models.config import Activation, BlockKind, ModelConfig, NormKind, Rope
from lq.models.context import Context
from lq.numerics.hadamard import rotate_hadamard
from lq.numerics.matmul import expert_matmul, matmul
from lq.numerics.sharded import Axes, with_rows_apart
from lq_kernels.kv_cache import QuantizedKVCache

CAUSAL_SLICES, SHORTEST_SLICED = 4, 256  # see `attend_causally`
CHUNK = 512  # tokens; see `attend_quantized`
TOKEN_OF_ROW = "token_of_row"  # sown by `MixtureOfExperts`: which token each of the rows sorted by expert is

# The logical names of the axes of a kernel, in and out, by the name of its map; see `lq.parallel.rules`.
KERNEL_AXES: dict[str, Axes] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "router": ("embed", None),
    "head": ("embed", "vocab"),
}

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def at_least_float32(dtype) -> jnp.dtype:
    """The dtype in which a computation in `dtype` is done where 16 bits would not do."""
    return jnp.promote_types(dtype, jnp.float32)


def unboxed(tree: Any) -> Any:
    """A tree of initialized parameters without the boxes that name their axes; of others itself.

    `flax.linen.meta.unbox` would lay them out over the mesh in force, which shapes alone cannot be.
    """
    boxed = lambda node: isinstance(node, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda node: node.value if boxed(node) else node, tree, is_leaf=boxed)


def read_or_init(module: nn.Module, name: str, init, shape, axes: Axes, dtype=jnp.float32) -> Any:
    """The parameter `name` as it stands, packed or dense; initialized, with the names of its axes, if there is none.

    `Module.param` compares the leaf with the initializer's shape and refuses a packed one.
    """
    if module.has_variable("params", name):
        return unboxed(module.get_variable("params", name))  # boxed while a model is initialized
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


def rotate_online(
    config: ModelConfig, place: str, x: Float[Array, "..."], *, axis: int = -1, inverse: bool = False
) -> Float[Array, "..."]:
    """`x` rotated where the model has a rotation at `place`, a field of `Rotation`; else as it is."""
    if config.rotation is None or not getattr(config.rotation, place):
        return x
    return rotate_hadamard(x, config.rotation.seed, place, axis=axis, inverse=inverse)


class Linear(nn.Module):
    """y = x @ kernel + bias, where `kernel` is a dense `[in, out]` array or packed, of that logical shape.

    Its name is one of `KERNEL_AXES`.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... in"], product: Any = None) -> Float[Array, "... out"]:
        """`product` is x @ kernel where it was computed with others' (see `linear_maps`)."""
        axes = KERNEL_AXES[self.name or ""]
        if product is None:
            init = nn.initializers.normal(0.02)
            product = matmul(x, read_or_init(self, "kernel", init, (x.shape[-1], self.features), axes), axes)
        if self.use_bias:
            bias = read_or_init(self, "bias", nn.initializers.zeros, (self.features,), axes[1:])
            product += bias.astype(product.dtype)
        return product


def linear_maps(module: nn.Module, x: Array, features: dict[str, int], use_bias: bool) -> list[Array]:
    """`Linear` maps of one input, by name, as children of `module`, the one whose `__call__` this is part of.

    One product where their kernels were prepared as one, under their joined names (`lq.models.prepared`).
    """
    products: Any = [None] * len(features)
    joint = "+".join(features)
    if len(features) > 1 and module.has_variable("params", joint):
        products = matmul(x, module.get_variable("params", joint))
    maps = zip(features.items(), products, strict=True)
    return [Linear(count, use_bias, name=name)(x, product) for (name, count), product in maps]


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32 at least."""

    config: ModelConfig
    kind: NormKind | None = None  # the config's when None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        config, dtype, width = self.config, x.dtype, x.shape[-1]
        kind = self.kind or config.norm
        x = x.astype(at_least_float32(dtype))
        if kind == "layernorm":
            x -= x.mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
        # The stored scale starts where the effective scale is 1.
        init = nn.initializers.constant(1.0 - config.norm_offset)
        scale = read_or_init(self, "scale", init, (width,), ("norm",))
        x *= scale.astype(x.dtype) + config.norm_offset
        if kind == "layernorm":
            x += read_or_init(self, "bias", nn.initializers.zeros, (width,), ("norm",)).astype(x.dtype)
        return x.astype(dtype)


def inverse_frequencies(rope: Rope, length: Int[Array, ""]) -> Float[Array, " pairs"]:
    """Radians per position of each rotated pair. `length`, that of the longest context, picks longrope's table.

    Computed on the host by the reference's own float32 steps: at position 100 000 the last bit of a frequency is 0.01
    rad.
    """
    pair = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / rope.rotary_dim
    wavelength = np.float32(rope.theta) ** pair  # over 2 pi
    frequency = 1.0 / wavelength
    if rope.kind == "linear":
        frequency /= rope.factor
    if rope.kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly.
        turns = rope.original_max_positions * frequency / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        frequency = (1.0 - blend) * frequency / rope.factor + blend * frequency
    if rope.kind == "longrope":
        short = 1.0 / (np.asarray(rope.short_factor, np.float32) * wavelength)
        long = 1.0 / (np.asarray(rope.long_factor, np.float32) * wavelength)
        return jnp.where(length > rope.original_max_positions, long, short)
    return jnp.asarray(frequency)


def rotate(
    x: Float[Array, "B S heads C"], positions: Int[Array, "B S"], rope: Rope, length: Int[Array, ""]
) -> Float[Array, "B S heads C"]:
    """Rotates channel i against channel i + rotary_dim/2 (the "half" pairing of Hugging Face checkpoints)."""
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, length)
    cos = (jnp.cos(angle) * rope.attention_factor)[:, :, None, :]
    sin = (jnp.sin(angle) * rope.attention_factor)[:, :, None, :]
    half = rope.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    wide = at_least_float32(x.dtype)
    a, b = a.astype(wide), b.astype(wide)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], -1) if rest.shape[-1] else rotated


def attend(
    q: Float[Array, "B S H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    mask: Bool[Array, "B S T"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B S H C"]:
    """Softmax attention; each key/value head serves H/G query heads. A query that sees no key gets a finite average."""
    scores = attention_scores(stack_queries(q, k.shape[2]), k, mask, scale, softcap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return unstack_queries(jnp.einsum("bgxt,btgc->bgxc", weights, v), q.shape)


def stack_queries(q: Float[Array, "B S H C"], G: int) -> Float[Array, "B G X C"]:
    """One matrix per key/value head, its query heads stacked along the rows, X = H/G * S.

    On the CPU one product per key/value head is twice as fast as leaving the five axes to the compiler.
    """
    B, S, H, C = q.shape
    return q.reshape(B, S, G, H // G, C).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, C)


def unstack_queries(y: Float[Array, "B G X C"], shape: tuple[int, ...]) -> Float[Array, "B S H C"]:
    """The inverse of `stack_queries`; `shape` is what it took."""
    B, S, H, C = shape
    G = y.shape[1]
    return y.reshape(B, G, H // G, S, C).transpose(0, 3, 1, 2, 4).reshape(shape)


def attention_scores(
    q: Float[Array, "B G X C"],
    k: Float[Array, "B T G C"],
    mask: Bool[Array, "B S T"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B G X T"]:
    """Scaled, capped and masked, in float32 at least. A key not to be seen has float32's least finite score."""
    scores = jnp.einsum("bgxc,btgc->bgxt", q, k, preferred_element_type=at_least_float32(q.dtype)) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    B, G, X, T = scores.shape
    scores = scores.reshape(B, G, -1, mask.shape[1], T)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min).reshape(B, G, X, T)


def attend_quantized(
    q: Float[Array, "B S H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    cache: QuantizedKVCache,
    context: Context,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B S H C"]:
    """`attend` over what the cache holds and then the new `k`, `v`, which it does not hold yet.

    So what one call brings is seen in full precision by all of its own queries, as in KIVI's prefill. The packed part
    is dequantized `CHUNK` tokens at a time and its softmax summed as it goes (arXiv 1805.02867): the dense cache is
    never there, and chunks not written yet cost nothing.
    """
    stacked = stack_queries(q, k.shape[2])

    def absorb(seen, k, v, mask):
        """(largest score, sum of exponentials, their weighted sum of values), with more keys."""
        largest, total, y = seen
        scores = attention_scores(stacked, k, mask, scale, softcap)
        now = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(largest - now)
        added = jnp.einsum("bgxt,btgc->bgxc", weights.astype(v.dtype), v, preferred_element_type=scores.dtype)
        return now, total * kept + weights.sum(-1, keepdims=True), y * kept + added

    least = jnp.full((*stacked.shape[:3], 1), jnp.finfo(jnp.float32).min)
    seen = (least, jnp.zeros_like(least), jnp.zeros(stacked.shape, jnp.float32))
    slots = jnp.concatenate([cache.ring_slots(context.start), context.start + jnp.arange(q.shape[1])])
    dense = lambda recent, new: jnp.concatenate([recent.astype(new.dtype), new], axis=1)  # noqa: E731
    seen = absorb(seen, dense(cache.recent_k, k), dense(cache.recent_v, v), context.mask(window, slots))
    if cache.groups:
        size = cache.spec.group_size
        count = min(max(CHUNK // size, 1), cache.groups)
        packed = cache.quantized(context.start)

        def chunk(i, seen):
            first = jnp.minimum(i * count, cache.groups - count)  # the last chunk overlaps the one before
            slots = first * size + jnp.arange(count * size)
            new = (slots >= i * count * size) & (slots < packed)
            return absorb(seen, *cache.read(first, count, k.dtype), context.mask(window, slots) & new)

        seen = jax.lax.fori_loop(0, -(-packed // (count * size)), chunk, seen)
    _, total, y = seen
    return unstack_queries((y / total).astype(v.dtype), q.shape)


def attend_causally(q, k, v, mask, scale, softcap) -> Float[Array, "B S H C"]:
    """`attend` where key t is never seen from before position t (S = T): slices of queries, each with its past alone.

    With four slices three eighths of the scores are never made; on the CPU a small model's whole forward pass is a
    sixth faster for it.
    """
    S = q.shape[1]
    ends = [-(-S * i // CAUSAL_SLICES) for i in range(CAUSAL_SLICES + 1)] if S >= SHORTEST_SLICED else [0, S]
    slices = [
        attend(q[:, a:b], k[:, :b], v[:, :b], mask[:, a:b, :b], scale, softcap) for a, b in itertools.pairwise(ends)
    ]
    return jnp.concatenate(slices, axis=1)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    config: ModelConfig
    kind: BlockKind

    @nn.compact
    def __call__(self, x, context, cache=None):
        """`x [B, S, D]` -> `[B, S, D]` and the updated cache (None when none was given)."""
        config = self.config
        q, k, v = (with_rows_apart(y, None, "heads", None) for y in self.heads(x, context))
        window, options = self.kind.window, (config.query_scale, config.attention_softcap)
        if cache is None:
            y = attend_causally(q, k, v, context.mask(window), *options)
        elif isinstance(cache, QuantizedKVCache):
            y = attend_quantized(q, k, v, cache, context, window, *options)
            cache = cache.append(k, v, context.start, context.key_valid)
        else:
            cache = cache.write(k, v, context.start)
            y = attend(q, cache.k.astype(x.dtype), cache.v.astype(x.dtype), context.mask(window), *options)
        y = rotate_online(config, "heads", y, axis=-2)
        y = y.reshape(*x.shape[:2], config.num_heads * config.head_dim)
        return Linear(config.hidden_size, config.attention_out_bias, name="o_proj")(y), cache

    def heads(self, x, context) -> list[Array]:
        """Queries, keys and values `[B, S, heads, C]` as attention takes them: normed, rotated. Part of `__call__`."""
        config, kv = self.config, self.config.num_kv_heads
        counts = {"q": config.num_heads, "k": kv, "v": kv}
        features = {f"{which}_proj": count * config.head_dim for which, count in counts.items()}
        maps = linear_maps(self, x, features, config.qkv_bias)
        heads = [y.reshape(*x.shape[:2], -1, config.head_dim) for y in maps]
        if config.qk_norm:
            heads[:2] = [Norm(config, name=f"{which}_norm")(y) for which, y in zip("qk", heads, strict=False)]
        if self.kind.rope is not None:
            heads[:2] = [rotate(y, context.positions, self.kind.rope, context.length) for y in heads[:2]]
        return heads


class MLP(nn.Module):
    """Feed-forward part, gated or plain."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        config = self.config
        act = ACTIVATIONS[config.activation]
        names = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)
        maps = linear_maps(self, x, dict.fromkeys(names, config.intermediate_size), config.mlp_bias)
        hidden = act(maps[0]) * maps[1] if config.gated_mlp else act(maps[0])
        hidden = rotate_online(config, "down", hidden)
        return Linear(config.hidden_size, config.mlp_bias, name="down_proj")(hidden)


class StackedLinear(nn.Module):
    """One bias-free linear map per expert, `kernel [experts, in, out]`, dense or packed."""

    experts: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "rows in"], rows_per_expert: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Rows are sorted by expert; `rows_per_expert` says how many belong to each."""
        init = nn.initializers.normal(0.02)
        axes = ("expert", *KERNEL_AXES[self.name or ""])
        kernel = read_or_init(self, "kernel", init, (self.experts, x.shape[-1], self.features), axes)
        return expert_matmul(x, kernel, rows_per_expert, axes)


class MixtureOfExperts(nn.Module):
    """Top-k routed gated MLPs (Mixtral, arXiv 2401.04088; Qwen3-MoE). No token is ever dropped."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        config, experts = self.config, self.config.experts
        if experts is None:
            raise ValueError("a routed block needs config.experts")
        tokens = x.reshape(-1, x.shape[-1])
        logits = Linear(experts.count, name="router")(tokens)
        probability = jax.nn.softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
        weight, chosen = jax.lax.top_k(probability, experts.per_token)
        if experts.renormalize:
            weight /= weight.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.ravel(), stable=True)  # sorted row r is copy order[r] of token order[r] // per_token
        rows = tokens[order // experts.per_token]
        self.sow("intermediates", TOKEN_OF_ROW, order // experts.per_token)  # for calibration; kept only when asked for
        per_expert = jnp.bincount(chosen.ravel(), length=experts.count)
        act: Activation = config.activation
        gate = StackedLinear(experts.count, experts.intermediate_size, name="gate_proj")(rows, per_expert)
        up = StackedLinear(experts.count, experts.intermediate_size, name="up_proj")(rows, per_expert)
        down = StackedLinear(experts.count, config.hidden_size, name="down_proj")
        y = down(rotate_online(config, "down", ACTIVATIONS[act](gate) * up), per_expert)
        y *= weight.ravel()[order, None].astype(y.dtype)
        return jnp.zeros_like(tokens).at[order // experts.per_token].add(y).reshape(x.shape)
