"""The weights of each unit, one block in memory at a time."""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jaxtyping import Array

from lq.errors import UserError
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.quantizers.apply import with_matrix


def weights_of(
    source: ParameterSource, units: Mapping[str, list[str]], metric: str
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Every unit with its matrices' weights by path, in the order of `units`, which are those of a block together.

    Raises UserError, naming the matrix, for a packed one and for weights that are not finite.
    """
    block, params = "", {}
    for unit, paths in units.items():
        name = paths[0].split("/")[0]
        if name != block:
            block, params = name, source.part(name)
        yield unit, {path: weight_at(params, path, metric) for path in paths}


def with_weights(params: Params, weights: Mapping[str, Array]) -> Params:
    """The parameters of a block with other weights at some of its matrices, given by full path."""
    for path, weight in weights.items():
        params = with_matrix(params, path, weight)
    return params


def weight_at(params: Params, path: str, metric: str) -> Array:
    """The weight of a matrix, out of the parameters of its block. Raises as `weights_of`."""
    leaf = params
    for key in path.split("/")[1:]:
        leaf = leaf[key]
    kernel = leaf["kernel"]
    if is_packed(kernel):
        raise UserError(f"metric {metric}: {path.split('/')[0]} is packed; score the original model")
    if not bool(jnp.isfinite(kernel).all()):
        raise UserError(
            f"metric {metric}: {path}: a weight is NaN or infinite; the model is damaged, give an intact one"
        )
    return kernel
