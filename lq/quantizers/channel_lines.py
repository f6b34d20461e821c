"""Channel lines: where a block's input channels can be rescaled without changing what the block computes.

A line is a producer whose output channel c is divided by s_c > 0, and the readers whose input channel c is multiplied
by it: what stands between the two is linear in each channel, or at least positively homogeneous. AWQ
(arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438) choose the s; both fold them here.

    producer          readers                         legal
    attention_norm    attention: q, k, v              always
    attention v       attention: o                    always: softmax mixes positions, not channels; query heads that
                                                      share a key/value head share its scales
    mlp_norm          mlp: gate and up, or up alone   always
    mlp_norm          moe: gate, up and the router    always: the router reads the same tensor, so its kernel is
                                                      multiplied too
    mlp up            mlp: down                       gated: down reads act(gate) * up. Plain: with ReLU alone, since
                                                      relu(x / s) = relu(x) / s; GELU and SiLU have no line here
    moe up            moe: down                       always; a scale for every expert

A norm that stores its gain less `norm_offset` (Gemma) is divided where it stands, gain and bias; the norms after
attention and feed-forward (Gemma 2 and 3) are in no line. A block that rotates the input of o or down as it runs
(`config.rotation`) mixes the channels a scale would have to pass through, and has no such line.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.models.config import BlockKind, ModelConfig
from lq.models.source import Params
from lq.numerics.qtensor import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One producer and its readers, by their paths within the block. Hashable: a static argument of jitted functions.

    A scale of the line has shape `[channels]`, or `[experts, channels]` where every expert has its own; the channels
    are the producer's.
    """

    producer: str
    readers: tuple[str, ...]
    inspected: str  # the module that reads the tensor: its output says what an error in the readers is worth
    channels: int
    experts: int | None = None
    router: str | None = None  # reads the tensor too, and stays dense
    sharing: int = 1  # readers' channels per channel of the producer: query heads that share a key/value head
    head_dim: int = 1  # channels next to one another that are shared together
    norm_offset: float = 0.0  # of a producer that is a norm

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels,) if self.experts is None else (self.experts, self.channels)

    def spread(self, scale):
        """`[..., channels]` of the producer -> `[..., channels * sharing]` of the readers."""
        heads = scale.reshape(*scale.shape[:-1], -1, 1, self.head_dim)
        return heads.repeat(self.sharing, axis=-2).reshape(*scale.shape[:-1], -1)

    def gather(self, values):
        """`[..., channels * sharing]` of the readers -> `[..., sharing, channels]`: each channel's readers together."""
        heads = values.reshape(*values.shape[:-1], -1, self.sharing, self.head_dim)
        return heads.swapaxes(-3, -2).reshape(*values.shape[:-1], self.sharing, -1)


@functools.cache
def channel_lines(config: ModelConfig, kind: BlockKind) -> tuple[Line, ...]:
    """Every line of a block of this kind, in the order of its computation."""
    rotation = getattr(config, "rotation", None)
    width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
    after_norm = {"channels": width, "norm_offset": config.norm_offset}
    qkv = ("attention/q_proj", "attention/k_proj", "attention/v_proj")
    lines = [Line(producer="attention_norm", readers=qkv, inspected="attention", **after_norm)]
    if not getattr(rotation, "heads", False):
        shared = {"sharing": config.num_heads // config.num_kv_heads, "head_dim": config.head_dim}
        o = "attention/o_proj"
        lines.append(Line(producer="attention/v_proj", readers=(o,), inspected=o, channels=kv_width, **shared))
    part, experts, router, inner = "mlp", None, None, config.intermediate_size
    if kind.routed and config.experts is not None:
        part, experts, router, inner = "moe", config.experts.count, "moe/router", config.experts.intermediate_size
    gated = kind.routed or config.gated_mlp
    readers = (f"{part}/gate_proj", f"{part}/up_proj") if gated else (f"{part}/up_proj",)
    lines.append(Line(producer="mlp_norm", readers=readers, inspected=part, router=router, **after_norm))
    if (gated or config.activation == "relu") and not getattr(rotation, "down", False):
        up, down = f"{part}/up_proj", f"{part}/down_proj"
        lines.append(Line(producer=up, readers=(down,), inspected=down, channels=inner, experts=experts))
    return tuple(lines)


def fold(params: Params, line: Line, scale: Float[Array, "*experts channels"]) -> Params:
    """The block's parameters with the producer divided by `scale` and the readers multiplied by it.

    Args:
      params: of one block, dense.
      line: one of `channel_lines`.
      scale: positive, of shape `line.shape`.

    Returns:
      New parameters, of the dtypes that `params` and `scale` promote to; what the line does not name is shared.

    Raises:
      ValueError: a scale of another shape, or a packed matrix.
    """
    if tuple(scale.shape) != line.shape:
        raise ValueError(f"a scale {tuple(scale.shape)} for {line.producer}, whose line takes {line.shape}")
    producer = dict(leaf_at(params, line.producer))
    if "scale" in producer:  # a norm
        producer["scale"] = (producer["scale"] + line.norm_offset) / scale - line.norm_offset
    else:
        producer["kernel"] = _dense(producer["kernel"], line.producer) / scale[..., None, :]
    if "bias" in producer:
        producer["bias"] = producer["bias"] / scale
    params = with_leaf(params, line.producer, producer)
    rows = line.spread(jnp.asarray(scale))[..., None]
    for path in (*line.readers, *([line.router] if line.router else [])):
        reader = leaf_at(params, path)
        params = with_leaf(params, path, {**reader, "kernel": _dense(reader["kernel"], path) * rows})
    return params


def with_storable_gains(config: ModelConfig, kind: BlockKind, params: Params, dtype) -> Params:
    """The same block with norm gains that `dtype` holds exactly, what they lack multiplied into the maps behind.

    Scales are folded into gains in float32; a gain rounded to 16 bits afterwards would leave its channel off by up to
    2^-9, which is more than 8-bit codes are.
    """
    for line in channel_lines(config, kind):
        producer = leaf_at(params, line.producer)
        if "scale" in producer:
            gain = producer["scale"] + line.norm_offset
            stored = producer["scale"].astype(dtype).astype(jnp.float32) + line.norm_offset
            params = fold(params, line, jnp.where((stored > 0) & (gain > 0), gain / stored, 1.0))
    return params


def in_float32(params: Params) -> Params:
    """Every leaf in float32. Raises ValueError, naming it, for a packed one."""

    def convert(path, leaf):
        return jnp.asarray(_dense(leaf, jax.tree_util.keystr(path, simple=True, separator="/")), jnp.float32)

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def leaf_at(params: Params, path: str) -> Params:
    """The parameters of the module at `path`."""
    for key in path.split("/"):
        params = params[key]
    return params


def with_leaf(params: Params, path: str, leaf: Params) -> Params:
    """`params` with those of the module at `path` replaced."""
    key, _, rest = path.partition("/")
    return {**params, key: with_leaf(params[key], rest, leaf) if rest else leaf}


def _dense(kernel, path: str) -> Array:
    if isinstance(kernel, QTensor):
        raise ValueError(f"{path} is packed; scales are folded before quantizing")
    return kernel
