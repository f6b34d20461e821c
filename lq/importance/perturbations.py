"""What quantization does to the matrices of a model, dW = Q(W) - W, seen from the gradients of its loss.

Q(W) are the matrices that the quantizer really makes, of models quantized uniformly at each of the options. All else
is the original's.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.errors import UserError
from lq.importance.backward import Kernels, WindowGradients, dense, join_block, split_block
from lq.importance.quantized import QuantizedOptions, quantized_sources
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import Packed
from lq.quantizers.planned import sixteen_bits


class Perturbations:
    """The original, and models that were quantized uniformly at each of `specs`, smallest first.

    Quantized once, block after block, and kept on the host, packed: at 2, 3 and 4 bits together about two thirds of the
    original in 16. Dense there is one block at a time.

    Raises UserError for a packed original, and for a quantizer that changes more than matrices, as one that scales
    channels does.
    """

    def __init__(self, source: ParameterSource, windows: Windows, options: QuantizedOptions):
        self.source, self.specs = source, options.specs
        config, self._packed = source.config, [[] for _ in self.specs]  # per option and block the matrices, by path
        quantized = quantized_sources(source, self.specs, options.recipe, windows, options.batch_size)
        for index, kind in enumerate(config.kinds):
            _, rest = split_block(config, kind, dense(source.block(index), f"block_{index}"))
            for option, one in enumerate(quantized):
                matrices, other = split_block(config, kind, one.block(index))
                if not _alike(other, sixteen_bits(rest)):
                    raise UserError(
                        f"{options.recipe.name} changes more of block_{index} than its matrices, of which alone a cost "
                        "can be told; leave out what scales channels or corrects biases"
                    )
                self._packed[option].append(jax.device_get(matrices))

    def model(self, option: int, share: float = 1.0) -> ParameterSource:
        """The original with W + share dW for every block matrix W."""
        return _Between(self, option, share)

    def errors(self, index: int, options: Sequence[int] | None = None) -> Kernels:
        """dW of every matrix of block `index`, by path within the block: `[options, ...]` float32, of all when None."""
        options = range(len(self.specs)) if options is None else options
        config = self.source.config
        kernels, _ = split_block(config, config.kinds[index], self.source.block(index, jnp.float32))
        return _differences(kernels, [self._packed[option][index] for option in options])

    def matrices(self, index: int, option: int) -> Kernels:
        """Q(W) of every matrix of block `index`, dequantized, by path within the block; float32."""
        return _dequantized(self._packed[option][index])


def slopes(found: WindowGradients, errors: dict[str, Float[Array, "options ..."]]):
    """Per matrix and option sum_ij g_ij dW_ij: what the loss changes by to first order. A `Reduce`."""
    gradients = found.kernel_gradients
    return {path: _sums(gradients[path] * error) for path, error in errors.items()}


def absolute_slopes(found: WindowGradients, errors: dict[str, Float[Array, "options ..."]]):
    """Per matrix and option sum_ij |g_ij dW_ij|. A `Reduce`."""
    gradients = found.kernel_gradients
    return {path: _sums(jnp.abs(gradients[path] * error)) for path, error in errors.items()}


def squared_slopes(found: WindowGradients, errors: dict[str, Float[Array, "options ..."]]):
    """Per matrix and option sum_ij (g_ij dW_ij)^2. A `Reduce`."""
    gradients = found.kernel_gradients
    return {path: _sums(jnp.square(gradients[path] * error)) for path, error in errors.items()}


def _sums(array: Float[Array, "options ..."]) -> Float[Array, " options"]:
    return array.sum(axis=tuple(range(1, array.ndim)))


class _Between(ParameterSource):
    """See `Perturbations.model`."""

    def __init__(self, perturbations: Perturbations, option: int, share: float):
        self.config = perturbations.source.config
        self._perturbations, self._option, self._share = perturbations, option, share

    def part(self, name: str, dtype=None) -> Params:
        params = self._perturbations.source.part(name, dtype)
        if not name.startswith("block_"):
            return params
        index = int(name.removeprefix("block_"))
        kernels, rest = split_block(self.config, self.config.kinds[index], params)
        quantized = self._perturbations.matrices(index, self._option)
        # Exact at both ends, which W + share (Q - W) is not.
        moved = {path: (1 - self._share) * w + self._share * quantized[path] for path, w in kernels.items()}
        return join_block(moved if dtype is None else {path: w.astype(dtype) for path, w in moved.items()}, rest)


@jax.jit
def _dequantized(packed: dict[str, Packed]) -> Kernels:
    return {path: leaf.dequantize() for path, leaf in packed.items()}


@jax.jit
def _differences(kernels: Kernels, packed: list[dict[str, Packed]]) -> Kernels:
    return {path: jnp.stack([one[path].dequantize() - kernel for one in packed]) for path, kernel in kernels.items()}


def _alike(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[path]), np.asarray(b[path])) for path in a)
