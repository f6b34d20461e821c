"""The one model description every family is translated into.

A `ModelConfig` says everything the decoder in `decoder.py` needs and nothing about where it came from; `families.py`
builds it from a Hugging Face config. It is frozen and hashable, so it can be a static argument of `jax.jit`.

Blocks of one model may differ in three ways only: the attention window, the rotary table, and whether the feed-forward
part is routed. These live in `BlockKind`. Two blocks of equal kind run through the same compiled function, which is
what keeps streaming over eighty blocks as cheap to compile as over two.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rmsnorm", "layernorm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) with the scalings found in released checkpoints."""

    theta: float = 10_000.0
    rotary_dim: int  # leading channels of each head that are rotated; the head width unless rotation is partial
    kind: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 8192  # llama3, longrope: the context length before extension
    short_factor: tuple[float, ...] = ()  # longrope: one divisor per rotated pair, up to the original context
    long_factor: tuple[float, ...] = ()  # longrope: the same beyond it
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockKind:
    """What may differ between the blocks of one model."""

    window: int | None = None  # a query sees this many positions, itself included; None: all before it
    rope: Rope | None = None  # None: learned positions are added to the embeddings instead
    routed: bool = False  # feed-forward part is a mixture of experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Shape and routing of a sparse mixture-of-experts feed-forward layer."""

    count: int
    per_token: int
    intermediate_size: int
    renormalize: bool = True  # divide the chosen probabilities by their sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """Randomized Hadamard rotations that a model applies as it runs (QuaRot, arXiv 2404.00456): where, and their seed.

    Rotations that are folded into weights leave no trace here. See `lq.transforms.hadamard`, which folds the inverse of
    these into the weights behind them.
    """

    seed: int
    residual: bool = False  # of the residual stream: behind the embedding, and back in front of the final norm
    heads: bool = False  # across the heads, channel by channel, in front of o_proj
    down: bool = False  # of the channels in front of down_proj


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts of channels, heads, tokens or blocks."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    kinds: tuple[BlockKind, ...]  # one per block, first to last
    activation: Activation = "silu"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)); otherwise down(act(up(x)))
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the stored norm scale; Gemma stores scale - 1
    post_norms: bool = False  # Gemma 2/3: norms after attention and feed-forward too
    final_norm: NormKind | None = None  # where the last norm is of another kind than `norm`
    qk_norm: bool = False  # norm over each query and key head
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float  # multiplies q.k before the softmax
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    center_embeddings: bool = False  # take their mean off the channels of each token's, as a LayerNorm would
    learned_position_offset: int | None = None  # row of position 0 in the learned table; None: no table
    tie_embeddings: bool = False
    experts: Experts | None = None
    rotation: Rotation | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def num_blocks(self) -> int:
        return len(self.kinds)
