"""Learned rounding of one block, or of one matrix: the loop that all parametrizations share.

    block:   minimize  mean (block(X_q; W^) - Y)^2        over the theta of all its matrices together,
             X_q its input behind the quantized blocks before it, Y the original block's output on the original's input
    matrix:  minimize  tr(D^T H D) / tr(W^T H W)          D = W^ - W, H = sum x x^T over its inputs

In a block's loop every step draws `batch_size` windows. Their loss says more about the windows than about the step;
where the step of least loss is asked for (`keep`), it is divided by the loss at the start on the same windows first.
Finally the start and the result are measured on all windows, as they will be stored, and the better one is returned.

A low-rank residual (LoRC) is fitted before anything is learned, to what the start leaves of the weights W - W^, all of
them alike. It is part of W^ from then on: rounding is learned around it, and it is in all that is measured.

Block parameters, inputs, targets and the drawn windows are arguments of the compiled functions, so that blocks of one
kind whose matrices have the same specs compile once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from lq.calibration.statistics import HIGHEST, InputStats
from lq.errors import UserError
from lq.models.config import BlockKind, ModelConfig
from lq.models.context import context_for
from lq.models.decoder import apply_block
from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.low_rank import low_rank_residual
from lq.quantizers.parametrization import Exported, LearnedOptions, Parametrization, export, fake_quant, initial
from lq.quantizers.placement import Place, beside

CHUNK = 50  # steps between two returns to the host
TINY = 1e-30  # a start without error divides by this

Kernels = dict[str, Array]  # path -> weight [..., K, N], float32
Residual = tuple[QTensor, QTensor]  # the packed factors
Block = Callable[[Params, Array], Array]  # (parameters, h [B, S, D]) -> [B, S, D]


@dataclasses.dataclass(frozen=True)
class BlockFunction:
    """A decoder block as a function of its parameters and input; equal for equal kinds, which share a program."""

    config: ModelConfig
    kind: BlockKind

    def __call__(self, params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return apply_block(self.config, self.kind, params, h, context_for(jnp.zeros(h.shape[:2], jnp.int32)))


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How a block's reconstruction went. Errors are mean squared errors of the output over all windows."""

    before: float  # of the start
    after: float  # of what was returned
    kept: Literal["learned", "start"]
    losses: np.ndarray  # float32 [steps], each over the loss at the start on the same windows
    residuals: Mapping[str, Residual]  # by path, of the matrices whose spec has a rank


class Fixed(NamedTuple):
    """What does not change while a block is learned. Trees by path."""

    of_method: dict[str, Any]  # what the parametrization keeps
    residual: dict[str, Residual]  # of matrices whose spec has a rank


class State(NamedTuple):
    """What a block's loop carries. Trees by path."""

    theta: Any
    moments: Any  # of the optimizers
    best: Any  # theta of the step of least loss so far; None where the last is kept
    losses: Float[Array, " steps"]  # infinite for steps to come


@dataclasses.dataclass(frozen=True)
class Learner:
    """A parametrization on the matrices of a block. Hashable: the static part of every jitted function here."""

    method: Parametrization
    specs: tuple[tuple[str, QuantSpec], ...]
    options: LearnedOptions

    def start(self, weights: Kernels) -> tuple[dict[str, Any], Fixed]:
        """Theta by path, and what stays fixed."""
        found = {path: initial(self.method, weights[path], spec, self.options) for path, spec in self.specs}
        theta = {path: of_path for path, (of_path, _) in found.items()}
        fixed = Fixed({path: of_path for path, (_, of_path) in found.items()}, {})
        left = self.kernels(theta, fixed, weights)
        residual = {p: low_rank_residual(weights[p] - left[p], spec) for p, spec in self.specs if spec.rank}
        return theta, fixed._replace(residual=residual)

    def kernels(self, theta, fixed: Fixed, weights: Kernels) -> Kernels:
        """The dequantized weights, differentiable in theta."""
        found = self._each(fake_quant, theta, fixed, weights)
        for path, (left, right) in fixed.residual.items():
            found[path] += jnp.matmul(left.dequantize(), right.dequantize(), precision=HIGHEST)
        return found

    def export(self, theta, fixed: Fixed, weights: Kernels) -> dict[str, Exported]:
        """Codes, scales and zeros by path."""
        return self._each(export, theta, fixed, weights)

    def moments(self, theta) -> dict[str, Any]:
        """The optimizers' state before the first step."""
        return {path: self.method.optimizer(spec, self.options).init(theta[path]) for path, spec in self.specs}

    def move(self, theta, moments, gradient, fixed: Fixed) -> tuple[dict[str, Any], dict[str, Any]]:
        """Theta and moments after one step."""
        moved, after = {}, {}
        for path, spec in self.specs:
            optimizer = self.method.optimizer(spec, self.options)
            update, after[path] = optimizer.update(gradient[path], moments[path], theta[path])
            updated = optax.apply_updates(theta[path], update)
            moved[path] = self.method.project(updated, fixed.of_method[path], self.options)
        return moved, after

    def _each(self, function: Callable, theta, fixed: Fixed, weights: Kernels) -> dict[str, Any]:
        return {
            path: function(self.method, theta[path], fixed.of_method[path], weights[path], spec, self.options)
            for path, spec in self.specs
        }


def reconstruct_block(
    method: Parametrization,
    apply: Block,
    params: Params,
    inputs: Float[np.ndarray, "samples S D"],
    targets: Float[np.ndarray, "samples S D"],
    specs: Mapping[str, QuantSpec],
    options: LearnedOptions,
    seed: int | None = None,
    on_steps: Callable[[int], None] = lambda done: None,
    place: Place = lambda weight: weight,
    held: Mapping[str, Bool[np.ndarray, " E"]] | None = None,
) -> tuple[dict[str, Exported], Reconstruction]:
    """Quantizes matrices of a block so that its output is near a target.

    Inputs and targets lie on the device as a whole and are gathered from there: `2 * samples * S * D` numbers, 8.6 GB
    in float32 for 128 windows of 2048 tokens at a width of 4096. Besides, a weight, its theta, its fake-quantized
    value, their gradients and the optimizer's state are 5 (AutoRound) to 7 (Adam) float32 numbers per weight.

    Args:
      method: the parametrization.
      apply: the block as a pure function of its parameters; hashable, and equal for blocks that share a program.
      params: its parameters, dense, any float dtype; matrices without a spec stay as they are.
      inputs: what the quantized block will be fed; their dtype is that of the computation.
      targets: what it should answer.
      specs: path of a matrix within the block -> its format; not empty.
      options: of the method.
      seed: draws the windows; `options.seed` when None.
      on_steps: called with how many steps are done: 0, and now and then.
      place: lays a weight out over devices. What is kept per weight follows it; the block is computed from the parts.
      held: which experts of a stack stay as they start, by its path; none of those that are not named.

    Returns:
      Per path codes uint32 `[..., K, N]`, scales float32 and zeros `[..., groups, N]`, as every quantizer returns them;
      and how it went, low-rank residuals included.
    """
    if inputs.shape != targets.shape or not specs:
        raise ValueError(f"inputs {inputs.shape} and targets {targets.shape} of a block with {len(specs)} matrices")
    learner = Learner(method, tuple(specs.items()), _of_the_program(options))
    flat = flatten_dict(params, sep="/")
    weights = {path: place(jnp.asarray(flat[f"{path}/kernel"], jnp.float32)) for path in specs}
    params = beside(params, next(iter(weights.values())))
    still = {path: jnp.asarray(experts) for path, experts in (held or {}).items()}
    samples, batch_size = len(inputs), min(options.batch_size, len(inputs))
    data = (jnp.asarray(inputs), jnp.asarray(targets))

    theta, fixed = _start(learner, weights)
    residuals = fixed.residual
    started, errors = _measured(apply, learner, batch_size, params, theta, fixed, weights, *data)
    before = float(errors.mean())
    if options.steps == 0:
        return started, Reconstruction(before, before, "start", np.zeros(0, np.float32), residuals)

    drawn = drawn_windows(samples, batch_size, options.steps, options.seed if seed is None else seed)
    expected, drawn = errors[drawn].mean(1), jnp.asarray(drawn)
    state = _begin(learner, theta)
    on_steps(0)
    for first in range(0, options.steps, CHUNK):
        last = min(first + CHUNK, options.steps)
        state = _advance(apply, learner, params, fixed, weights, still, state, *data, drawn, expected, first, last)
        jax.block_until_ready(state)
        on_steps(last)
    theta = state.theta if options.keep == "last" else state.best
    learned, errors = _measured(apply, learner, batch_size, params, theta, fixed, weights, *data)
    after, losses = float(errors.mean()), np.asarray(state.losses)
    if options.guard and not after <= before:  # NaN falls back on the start too
        return started, Reconstruction(before, before, "start", losses, residuals)
    return learned, Reconstruction(before, after, "learned", losses, residuals)


def reconstruct_matrix(
    method: Parametrization,
    weight: Float[Array, "... K N"],
    stats: InputStats | None,
    spec: QuantSpec,
    options: LearnedOptions,
) -> Exported:
    """Quantizes one matrix so that its outputs on the calibration tokens are near the original's. Jittable.

    Every step sees all tokens, through the second moment `stats.hessian` `[..., K, K]`. Losses are therefore exact, and
    a sum over output channels: of each channel the step of least loss is kept, whatever `keep` says, and none is worse
    than at the start. Raises UserError without a second moment.
    """
    if stats is None or stats.hessian is None:
        raise UserError("learned rounding needs calibration text; give --calibration FILE, or wikitext2 or c4")
    if weight.ndim > 2:
        one = lambda w, s: reconstruct_matrix(method, w, s, spec, options)  # noqa: E731
        return jax.vmap(one)(weight, InputStats(tokens=stats.tokens, hessian=stats.hessian))
    learner, weights = Learner(method, (("", spec),), options), {"": weight.astype(jnp.float32)}
    theta, fixed = learner.start(weights)

    def errors(theta) -> Float[Array, " N"]:
        error = learner.kernels(theta, fixed, weights)[""] - weights[""]
        return jnp.sum(error * jnp.matmul(stats.hessian, error, precision=HIGHEST), axis=0)

    def better(best, theta, found):
        least, kept = best
        return jnp.minimum(found, least), jax.tree.map(lambda new, old: jnp.where(found < least, new, old), theta, kept)

    def step(_, state):
        theta, moments, best = state
        found, pull = jax.vjp(errors, theta)
        (gradient,) = pull(jnp.full_like(found, 1 / unit))
        moved, moments = learner.move(theta, moments, gradient, fixed)
        return moved, moments, better(best, theta, found)

    start = errors(theta)
    unit = jnp.maximum(start.sum(), TINY)
    theta, _, best = jax.lax.fori_loop(0, options.steps, step, (theta, learner.moments(theta), (start, theta)))
    _, kept = better(best, theta, errors(theta))
    return learner.export(kept, fixed, weights)[""]


def drawn_windows(samples: int, batch_size: int, steps: int, seed: int) -> Int[np.ndarray, "steps B"]:
    """Which windows each step sees: one shuffled pass over all after another."""
    generator = np.random.default_rng(seed)
    passes = -(-steps * batch_size // samples)
    order = np.concatenate([generator.permutation(samples) for _ in range(passes)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _of_the_program(options: LearnedOptions) -> LearnedOptions:
    """`options` with what does not change the compiled functions at fixed values, so that they are shared."""
    return dataclasses.replace(options, seed=0, guard=True, unit="block", propagate=True)


def _squared_errors(apply: Block, params: Params, kernels: Kernels, inputs, targets) -> Float[Array, " B"]:
    """Mean squared error of each window's output, in float32."""
    flat = flatten_dict(params, sep="/") | {f"{path}/kernel": kernel for path, kernel in kernels.items()}
    out = apply(unflatten_dict(flat, sep="/"), inputs)
    return jnp.square(out.astype(jnp.float32) - targets.astype(jnp.float32)).mean((1, 2))


@functools.partial(jax.jit, static_argnames="learner")
def _start(learner: Learner, weights: Kernels):
    return learner.start(weights)


@functools.partial(jax.jit, static_argnames="learner")
def _begin(learner: Learner, theta) -> State:
    best = theta if learner.options.keep == "best" else None
    return State(theta, learner.moments(theta), best, jnp.full(learner.options.steps, jnp.inf, jnp.float32))


@functools.partial(jax.jit, static_argnames=("apply", "learner", "batch_size"))
def _measured(apply: Block, learner: Learner, batch_size: int, params, theta, fixed, weights, inputs, targets):
    """What would be stored, and its error on every window, `batch_size` of them at a time."""
    kernels, samples = learner.kernels(theta, fixed, weights), len(inputs)
    # The last batch is filled up with windows from the front, whose errors are then left out.
    rows = jnp.arange(-(-samples // batch_size) * batch_size).reshape(-1, batch_size) % samples
    errors = jax.lax.map(lambda row: _squared_errors(apply, params, kernels, inputs[row], targets[row]), rows)
    return learner.export(theta, fixed, weights), errors.reshape(-1)[:samples]


@functools.partial(jax.jit, static_argnames=("apply", "learner"), donate_argnames="state")
def _advance(apply, learner, params, fixed, weights, held, state: State, inputs, targets, drawn, expected, first, last):
    """Steps `first` to `last`, both traced: chunks of any length are one program."""
    # Gradients are those of the loss over the start's: far above the epsilon of Adam, whatever the scale of h.
    unit = jnp.maximum(expected.mean(), TINY)

    def step(t, state: State) -> State:
        def loss(theta) -> Array:
            kernels = learner.kernels(theta, fixed, weights)
            return _squared_errors(apply, params, kernels, inputs[drawn[t]], targets[drawn[t]]).mean() / unit

        value, gradient = jax.value_and_grad(loss)(state.theta)
        ratio, best = value * unit / jnp.maximum(expected[t], TINY), state.best
        if learner.options.keep == "best":
            less = ratio < state.losses.min()
            best = jax.tree.map(lambda new, old: jnp.where(less, new, old), state.theta, best)
        gradient |= {path: _without(gradient[path], experts) for path, experts in held.items()}
        theta, moments = learner.move(state.theta, state.moments, gradient, fixed)
        return State(theta, moments, best, state.losses.at[t].set(ratio))

    return jax.lax.fori_loop(first, last, step, state)


def _without(gradient, experts: Bool[Array, " E"]):
    """Zero for these experts, whom no optimizer moves then."""
    rows = lambda leaf: experts.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.where(rows(leaf), 0.0, leaf), gradient)
