"""AWQ's first step: input channels of a block rescaled so that those with large activations are rounded finely.

For every channel line of the block (`lq.quantizers.channel_lines`) with readers W and the tensor X that they read,

    s(alpha) = mean|X|^alpha / sqrt(max * min of it over the channels),  mean|X|^alpha at least 1e-4,
    alpha* = argmin over alpha = 0, 1/20, ... 19/20 of  mean (f(X; Q(s W) / s) - f(X; W))^2,

f the module that the tensor enters: the whole attention or feed-forward part, with its softmax or activation, or the
one matrix. The first of equal candidates wins; alpha = 0 is s = 1, plain rounding, so no line is worse for it on the
calibration set. Q is rounding to nearest within min and max (Lin et al., arXiv 2306.00978, section 3.2, and its
reference code). With `duo` scales are mean|X|^alpha / mean|W|^(1 - alpha), W over the largest weight of its group, and
s = 1 is one more candidate, the first.

All lines of a block are searched on its original weights and inputs, then folded together. Query heads that share a
key/value head share their scale, made of their mean. An expert has its own scale and alpha inside, and none of its own
on its input, which the router reads too. One that saw too few tokens lacks them in both, mean|X| and the errors that
alpha is chosen by: they are filled up from all experts (`lq.quantizers.experts`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.calls import calls_in_block, expert_of_rows
from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.layers import MLP, Attention, MixtureOfExperts
from lq.models.matrices import block_matrices
from lq.models.source import Params
from lq.numerics.matmul import expert_matmul, matmul
from lq.numerics.sharded import to_host
from lq.numerics.spec import QuantSpec
from lq.quantizers.awq import ScalingOptions
from lq.quantizers.channel_lines import Line, fold, in_float32, leaf_at, with_leaf
from lq.quantizers.experts import Shortage, fill_in
from lq.quantizers.line_inputs import line_statistics
from lq.quantizers.rtn import RTNOptions, rtn, split_groups

SMALLEST = 1e-4  # of mean|X|^alpha: a channel that is never active
Rounding = tuple[tuple[str, QuantSpec, RTNOptions], ...]  # the readers that will be quantized, and how


@dataclasses.dataclass(frozen=True)
class ScaledLine:
    """What the search made of one line."""

    line: Line
    alpha: tuple[float | None, ...]  # chosen, one per expert that has a scale of its own; None: s = 1 besides the grid
    before: float  # mean squared error of the inspected module's output with s = 1
    after: float  # and with the chosen scale
    scale: np.ndarray = dataclasses.field(compare=False, repr=False)  # what was folded, float32 of `line.shape`


def scale_block(
    config: ModelConfig,
    kind: BlockKind,
    block_params: Params,
    hidden: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    specs: Mapping[str, QuantSpec],
    options: ScalingOptions,
    name: str = "block",
    note: Callable[[str], None] = lambda line: None,
) -> tuple[Params, tuple[ScaledLine, ...]]:
    """AWQ's scales of every line of a block, those whose rounding changes its outputs least, folded.

    Args:
      config, kind: of the block.
      block_params: dense.
      hidden: inputs of the block `[B, S, D]`, one array a batch; their dtype is that of the computation.
      tokens: int32 `[B, S]` of each batch, without padding.
      specs: by path within the block ("attention/q_proj"), of the matrices that will be quantized. A line none of whose
        readers is there is left alone.
      options: of the search; those of `awq` will do.
      name: of the block, in errors.
      note: takes lines for the user.

    Returns:
      The block's parameters in float32, computing what `block_params` do, and what was found, line by line.

    Raises:
      UserError: outputs of a module are not finite on these inputs; a convention that contradicts a spec.
      ValueError: a spec for a matrix that the block does not have; a packed matrix.
    """
    if unknown := specs.keys() - block_matrices(config, kind).keys():
        raise ValueError(f"{name} has no matrix {sorted(unknown)[0]}")
    params = in_float32(block_params)
    folded, found = params, []
    for line, stats in line_statistics(config, kind, params, hidden, tokens, frozenset({"absolute"})).items():
        rounding = tuple((path, specs[path], options.rounding(specs[path])) for path in line.readers if path in specs)
        if not rounding:
            continue
        elements = max(float(np.sum(stats.tokens)), 1.0) * config.hidden_size
        shortage = None
        if line.experts is not None:
            shortage = Shortage.of(stats, line.channels, moment=False)
            shortage.tell(f"{name}/{rounding[0][0]}", "their channel scales are found with the tokens of all", note)
            stats = fill_in(stats, shortage)
        alphas, scales = candidates(line, stats, params, rounding, options)
        total = np.zeros(())  # [candidates, 1 or experts]
        for h, batch in zip(hidden, tokens, strict=True):
            errors = squared_errors(config, kind, line, rounding, params, batch, h, scales)
            total = total + to_host(errors).astype(np.float64)
        if not np.isfinite(total[0]).all():
            raise UserError(
                f"{name}/{line.inspected}: its output is NaN or infinite on the calibration text; the model is damaged"
            )
        judged = total if shortage is None else shortage.filled(total.T).T
        found.append(_best(line, alphas, scales, total, judged, elements))
        folded = fold(folded, line, jnp.asarray(found[-1].scale))
    return folded, tuple(found)


def _best(
    line: Line,
    alphas: list[float | None],
    scales: np.ndarray,
    total: np.ndarray,
    judged: np.ndarray,
    elements: float,
) -> ScaledLine:
    """Of each expert, or of the line, the first of the candidates that is `judged` best; `total` are its own errors."""
    best = np.where(np.isfinite(judged), judged, np.inf).argmin(axis=0)
    each = np.arange(len(best))
    before, after = (float(errors.sum() / elements) for errors in (total[0], total[best, each]))
    return ScaledLine(line, tuple(alphas[i] for i in best), before, after, scales[best, each].reshape(line.shape))


def candidates(
    line: Line, stats: InputStats, params: Params, rounding: Rounding, options: ScalingOptions
) -> tuple[list[float | None], np.ndarray]:
    """Every alpha and its scales, float32 `[candidates, 1 or experts, channels]`, s = 1 first. Computed in float64."""
    level = _shared_mean(line, to_host(stats.mean_absolute).astype(np.float64))
    exponents = np.arange(options.scale_grid)[:, None, None] / options.scale_grid
    raw = level**exponents
    if options.duo:
        weights = _shared_mean(line, _mean_relative_weight(line, params, rounding))
        raw /= weights ** (1 - exponents) + SMALLEST
    raw = np.maximum(raw, SMALLEST)
    scales = raw / np.sqrt(raw.max(axis=-1, keepdims=True) * raw.min(axis=-1, keepdims=True))
    alphas: list[float | None] = list(exponents.ravel().tolist())
    if options.duo:
        alphas, scales = [None, *alphas], np.concatenate([np.ones_like(scales[:1]), scales])
    return alphas, scales.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("config", "kind", "line", "rounding"))
def squared_errors(config: ModelConfig, kind: BlockKind, line: Line, rounding: Rounding, params, tokens, h, scales):
    """Sum of squared changes of the inspected module's output over one batch, float32 `[candidates, 1 or experts]`.

    Compiled once per line and the specs of its readers, whichever block it is in. The candidates go one after another:
    one set of rounded weights and one output are there at a time.
    """
    context = context_for(tokens)
    args = calls_in_block(config, kind, params, h, context, {line.inspected: "__call__"})[line.inspected].args
    target = _inspect(config, kind, line, params, args)

    def of_candidate(scale):
        rows = line.spread(scale.reshape(line.shape))[..., None]
        rounded = params
        for path, spec, options in rounding:
            leaf = leaf_at(rounded, path)
            kernel = fake_quantize(leaf["kernel"] * rows, spec, options) / rows
            rounded = with_leaf(rounded, path, {**leaf, "kernel": kernel})
        error = jnp.square((_inspect(config, kind, line, rounded, args) - target).astype(jnp.float32))
        if line.experts is None:
            return error.sum()[None]
        expert = expert_of_rows(args[1], error.shape[0])
        return jax.ops.segment_sum(error.sum(-1), expert, line.experts, indices_are_sorted=True)

    return jax.lax.map(of_candidate, scales)


def fake_quantize(weight: Float[Array, "... K N"], spec: QuantSpec, options: RTNOptions) -> Float[Array, "... K N"]:
    """The float32 weight that its codes, rounded to nearest, stand for."""
    codes, scales, zeros = rtn(weight, None, spec, options)

    def per_row(groups):
        length = spec.group_length(weight.shape[-2])
        return jnp.repeat(groups.astype(jnp.float32), length, axis=-2)[..., : weight.shape[-2], :]

    zero = spec.zero_point if zeros is None else per_row(zeros)
    return (codes.astype(jnp.float32) - zero) * per_row(scales)


def _inspect(config: ModelConfig, kind: BlockKind, line: Line, params: Params, args: tuple) -> Array:
    """The output of the inspected module on what it was called with."""
    leaf = leaf_at(params, line.inspected)
    modules = {"attention": Attention(config, kind), "mlp": MLP(config), "moe": MixtureOfExperts(config)}
    if line.inspected in modules:
        output: Any = modules[line.inspected].apply({"params": leaf}, *args)
        return output[0] if line.inspected == "attention" else output  # the other is a cache, None
    return expert_matmul(args[0], leaf["kernel"], args[1]) if line.experts else matmul(args[0], leaf["kernel"])


def _shared_mean(line: Line, values: np.ndarray) -> np.ndarray:
    """`[1 or experts, channels]` of the producer from the readers' `[..., channels * sharing]`."""
    return line.gather(values).mean(axis=-2).reshape(-1, line.channels)


def _mean_relative_weight(line: Line, params: Params, rounding: Rounding) -> np.ndarray:
    """Per input channel, the mean over all output channels of all readers of |w| / (the largest of its group)."""
    total, columns = np.zeros(()), 0
    for path, spec, _ in rounding:
        kernel = leaf_at(params, path)["kernel"]
        if line.experts is None:
            kernel = jnp.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1)
        total = total + to_host(_relative_weight(kernel, spec)).astype(np.float64)
        columns += kernel.shape[-1]
    return total / columns


@functools.partial(jax.jit, static_argnames="spec")
def _relative_weight(kernel, spec: QuantSpec):
    """`[..., K, N]` -> `[..., K]`, summed over the output channels."""
    if kernel.ndim > 2:
        return jax.vmap(lambda kernel: _relative_weight(kernel, spec))(kernel)
    grouped = jnp.abs(split_groups(kernel, spec)[0])
    relative = grouped / (grouped.max(axis=1, keepdims=True) + 1e-6)
    return relative.sum(-1).reshape(-1)[: kernel.shape[0]]
