"""The mean curvature of the loss along a matrix times the squared error of quantization (HAWQ-V2).

    C[unit, option] = 1/2 sum over its matrices of  tr(H) / n  ||dW||^2,      H the Hessian of the mean loss by W

in nats per token, with dW = Q(W) - W the error that the quantizer really makes, of n weights. It is the second-order
term of the loss for an error of this size in a random direction. The authors leave out the half, which changes no
order, and the first-order term, which is zero where a model is trained.

Traces are Hutchinson's: E[v^T H v] = tr(H) for v of random signs. All matrices are probed at once, for the signs of two
are independent: E[v_k^T (H v)_k] = tr(H_kk). In a matrix whose Hessian is diagonal a probe alone is exact; in general
one has a variance of 2 sum_{i != j} H_ij^2, and of the rows of H that reach into the other matrices once more. What
remains of it after `probes` is in `extra`.

The loss is the text's (`nll`, as published), whose trace may be negative, of a model that is not trained to the end on
such text even significantly so; or the KL divergence to the original (`kl`), whose Hessian at the original is the
Fisher information and positive semi-definite.

H v is the derivative of the gradient along v, forward over reverse, for the whole model at once: all of it is in memory
here, in float32 and several times over, unlike in the scores that need gradients alone.

Source: Dong et al., HAWQ-V2, arXiv 1911.03852; Hutchinson, 1990.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.calibration.stream import check_context
from lq.errors import UserError
from lq.importance.backward import Kernels, dense, join_block, split_block
from lq.importance.losses import Loss, Text, text_of, window_loss
from lq.importance.perturbations import Perturbations
from lq.importance.quantized import QuantizedOptions, scores_from
from lq.importance.units import units_of
from lq.models.config import ModelConfig
from lq.models.context import context_for
from lq.models.decoder import apply_block, embed
from lq.models.matrices import matrices
from lq.models.source import ParameterSource, Params
from lq.numerics.sharded import to_host

PASSES = {"nll": 6, "kl": 7}  # of a probe, in forward passes: twice a gradient's three; and one of the original


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianTraceOptions(QuantizedOptions):
    loss: Literal["nll", "kl"] = "nll"  # of the text, or to the original
    probes: int = 16
    seed: int = 0  # of the probes

    def __post_init__(self):
        super().__post_init__()
        if self.probes < 1:
            raise UserError(f"probes: {self.probes}; write 1 or more")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed: {self.seed}; write a whole number from 0 to {(1 << 32) - 1}")


def hessian_trace(source: ParameterSource, windows: Windows, options: HessianTraceOptions) -> dict:
    """The trace of the loss's Hessian times the squared error of quantization (HAWQ-V2); the whole model in memory."""
    perturbations = Perturbations(source, windows, options)
    probed = traces(
        source, windows, loss=options.loss, probes=options.probes, seed=options.seed, batch_size=options.batch_size
    )
    found = {path: float(of_probes.mean()) for path, of_probes in probed.items()}
    spread = {path: float(of_probes.std(ddof=1)) for path, of_probes in probed.items() if options.probes > 1}
    losses, sizes = {}, matrices(source.config)
    for index in range(source.config.num_blocks):
        for path, squared in _squared_errors(perturbations.errors(index)).items():
            path = f"block_{index}/{path}"
            losses[path] = 0.5 * found[path] / math.prod(sizes[path]) * to_host(squared).astype(np.float64)
    return scores_from(units_of(source.config, options.unit), options.specs, losses) | {
        "passes": float(PASSES[options.loss] * options.probes),
        "extra": {
            "trace": found,
            "standard_error": {path: one / math.sqrt(options.probes) for path, one in spread.items()},
        },
    }


def traces(
    source: ParameterSource,
    windows: Windows,
    *,
    loss: Literal["nll", "kl"] = "nll",
    probes: int,
    seed: int = 0,
    batch_size: int = 8,
    dtype=jnp.float32,
) -> dict[str, Float[np.ndarray, " probes"]]:
    """Estimates of tr(H), one a probe, of every block matrix by path; of the mean loss of the text, float64."""
    config, text = source.config, text_of(windows, batch_size)
    check_context(config, windows.tokens.shape[1])
    params = source.params(dtype)
    kernels, rest = {}, {"embed": params["embed"], "head": params["head"]}
    for index, kind in enumerate(config.kinds):
        name = f"block_{index}"
        found, rest[name] = split_block(config, kind, dense(params[name], name))
        kernels |= {f"{name}/{path}": kernel for path, kernel in found.items()}
    totals = {path: np.zeros(probes) for path in kernels}
    for probe in range(probes):
        signs = random_signs(jax.random.fold_in(jax.random.key(seed), probe), kernels)
        for batch in text:
            for path, found in _curvatures(config, loss, kernels, rest, signs, batch).items():
                totals[path][probe] += to_host(found).astype(np.float64).sum()
    tokens = sum(int(batch.scored.sum()) for batch in text)
    return {path: total / tokens for path, total in totals.items()}


def random_signs(key: Array, like: Kernels) -> Kernels:
    """1 or -1 with equal chance, independent; of an array's place among the others, not of its name."""
    places = enumerate(like.items())
    return {path: jax.random.rademacher(jax.random.fold_in(key, i), a.shape, a.dtype) for i, (path, a) in places}


def curvatures(loss: Callable[[Kernels], Array], at: Kernels, v: Kernels) -> dict[str, Float[Array, ""]]:
    """v_k^T (H v)_k of every array k, H the Hessian of `loss` by all of them together."""
    _, product = jax.jvp(jax.grad(loss), (at,), (v,))
    return {path: jnp.vdot(v[path], product[path]) for path in v}


@functools.partial(jax.jit, static_argnames=("config", "loss"))
def _curvatures(config: ModelConfig, loss: Loss, kernels: Kernels, rest: Params, signs: Kernels, text: Text):
    """`curvatures` of the loss of every window, `[windows]`."""

    def last_hidden(kernels: Kernels, tokens):
        context = context_for(tokens)
        h = embed(config, rest, tokens, context, next(iter(kernels.values())).dtype)
        for index, kind in enumerate(config.kinds):
            name = f"block_{index}"
            own = {path.removeprefix(f"{name}/"): w for path, w in kernels.items() if path.startswith(f"{name}/")}
            h = apply_block(config, kind, join_block(own, rest[name]), h, context)
        return h[0]

    def of_window(window: Text):
        tokens = window.tokens[None]
        if loss == "kl":
            window = dataclasses.replace(window, original=last_hidden(kernels, tokens))
        return curvatures(
            lambda moved: window_loss(config, loss, rest, 0, window, last_hidden(moved, tokens)), kernels, signs
        )

    return jax.lax.map(of_window, text)


@jax.jit
def _squared_errors(errors: dict[str, Float[Array, "options ..."]]) -> dict[str, Float[Array, " options"]]:
    return {path: jnp.square(error).sum(axis=tuple(range(1, error.ndim))) for path, error in errors.items()}
