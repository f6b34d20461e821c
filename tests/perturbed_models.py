"""A small model quantized uniformly, in NumPy float64: what scores of gradients are held to."""

import jax
import jax.numpy as jnp
import numpy as np
from small_models import llama_config, random_params
from whole_model import kernels_of, whole_gradients, with_kernels

from lq.calibration.data import Windows
from lq.models.matrices import matrices
from lq.models.source import InMemory
from lq.numerics.segmented import is_packed
from lq.numerics.spec import QuantSpec
from lq.quantizers import PlannedSource, Recipe
from lq.quantizers.rtn import RTNOptions

WINDOWS = Windows(np.random.default_rng(0).integers(1, 4096, (4, 12), np.int32), "random", "random")
SCORED = 4 * 11
BITS = (2, 4)
CLIP = {"clip": "none"}  # a search is many programs, and how weights are rounded is not what is tested
OPTIONS = {"bits": [4, 2], "group_size": 32, "batch_size": 2, "unit": "matrix", "options": CLIP}
NAMES = [f"int{bits}-g32" for bits in BITS]


def small_source(blocks: int = 2) -> InMemory:
    config = llama_config(blocks, 32)
    return InMemory(config, random_params(config, dtype=jnp.float32))


def weights(source) -> dict[str, np.ndarray]:
    """Block matrices by path, packed ones dequantized, float64."""
    params = jax.tree.map(
        lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, source.params(), is_leaf=is_packed
    )
    return {path: np.asarray(w, np.float64) for path, w in kernels_of(source.config, params).items()}


def errors(source, bits: int) -> dict[str, np.ndarray]:
    """dW of the model quantized uniformly, by path, float64."""
    specs = dict.fromkeys(matrices(source.config), QuantSpec(bits=bits, group_size=32))
    quantized = weights(PlannedSource(source, specs, Recipe(options=RTNOptions(clip="none"))))
    return {path: quantized[path] - w for path, w in weights(source).items()}


def at(source, error, share: float = 1.0):
    """The source's parameters with a share of an error in its block matrices."""
    return with_kernels(source.params(), {path: w + share * error[path] for path, w in weights(source).items()})


def gradients(source, params, loss: str = "nll") -> list[dict[str, np.ndarray]]:
    """Per window the gradient of its summed loss at `params`, by path, float64."""
    original = source.params() if loss == "kl" else None
    return whole_gradients(source.config, params, WINDOWS.tokens, original)


def slope(window, error) -> dict[str, float]:
    return {path: float((window[path] * error[path]).sum()) for path in error}
