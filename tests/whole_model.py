"""Losses of a model and their gradients in one piece, float64: what is computed block by block is held to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lq.models.config import ModelConfig
from lq.models.decoder import Decoder
from lq.models.matrices import matrices


def in_float64(params):
    """Parameters as float64 arrays; call under `jax.enable_x64(True)`."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)


def kernels_of(config: ModelConfig, params) -> dict[str, np.ndarray]:
    """The block matrices by path."""
    flat = flatten_dict(params, sep="/")
    return {path: flat[f"{path}/kernel"] for path in matrices(config)}


def with_kernels(params, kernels):
    """`params` with other block matrices, by path."""
    flat = flatten_dict(params, sep="/") | {f"{path}/kernel": kernel for path, kernel in kernels.items()}
    return unflatten_dict(flat, sep="/")


def whole_loss(config: ModelConfig, params, tokens, original=None):
    """-ln p of all tokens but the first, summed; or the KL divergence from the model with the parameters `original`."""
    log_q = jax.nn.log_softmax(Decoder(config).apply({"params": params}, tokens)[:, :-1])
    if original is None:
        return -jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1).sum()
    log_p = jax.nn.log_softmax(Decoder(config).apply({"params": original}, tokens)[:, :-1])
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def whole_gradients(config: ModelConfig, params, tokens, original=None) -> list[dict[str, np.ndarray]]:
    """Of every window the gradient of `whole_loss` by each block matrix, NumPy float64."""
    with jax.enable_x64(True):
        params = in_float64(params)
        original = None if original is None else in_float64(original)
        kernels = kernels_of(config, params)
        windows = [_gradient(config, kernels, params, row[None], original) for row in np.asarray(tokens)]
        return [{path: np.asarray(gradient) for path, gradient in window.items()} for window in windows]


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, kernels, params, tokens, original):
    return jax.grad(lambda kernels: whole_loss(config, with_kernels(params, kernels), tokens, original))(kernels)
