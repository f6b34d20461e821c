"""From weights to packed leaves: one matrix, and the matrices of one part of a model. Pure; knows trees, not files.

A spec is given per matrix path, as `lq.models.matrices` names them. A path without a spec stays dense.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lq.calibration.statistics import InputStats
from lq.errors import UserError
from lq.models.matrices import EMBEDDING
from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import Packed, SegmentedQTensor, is_packed
from lq.numerics.spec import QuantSpec
from lq.quantizers.low_rank import with_residual
from lq.quantizers.placement import Place, back
from lq.quantizers.recipe import ORDER_REFUSED, Recipe
from lq.quantizers.registry import QUANTIZERS


@functools.partial(jax.jit, static_argnames=("spec", "method", "options"))
def quantize_matrix(
    weight: Array, stats: Any, spec: QuantSpec, method: str, options, hessian: Array | None = None
) -> QTensor:
    """One weight `[..., K, N]`, packed. Compiled once per shape, spec and options, whichever block it is in.

    Args:
      weight: any float dtype.
      stats: the `InputStats` with the fields that the method needs, or what its `prepare` made of them; None for a
        method that needs none.
      spec: the format; one that is mixed is for `segmented_matrix`.
      method, options: a name in `QUANTIZERS` and its options.
      hessian: what a low-rank residual minimizes the error in; None: all weights count alike.
    """
    # A matrix that is here has neither: it cannot be mixed or ordered where its spec says so.
    plain = dataclasses.replace(spec, rank=0, by_energy=False)
    codes, scales, zeros = QUANTIZERS[method].function(weight.astype(jnp.float32), stats, plain, options)
    tensor = QTensor.from_codes(codes, scales, zeros, dataclasses.replace(spec, rank=0))
    return with_residual(tensor, weight, spec.rank, hessian) if spec.rank else tensor


def quantize_leaf(weight: Array, stats: InputStats | None, prepared: Any, spec: QuantSpec, recipe: Recipe) -> Packed:
    """One weight packed, its low-rank residual included. `prepared` is what the method's `prepare` made of `stats`."""
    if spec.orders(weight.shape) or spec.mixes(weight.shape):
        return segmented_matrix(weight, prepared, spec, recipe)
    hessian = stats.hessian if stats is not None and spec.rank else None
    return quantize_matrix(weight, prepared, spec, recipe.method, recipe.options, hessian)


def segmented_matrix(weight: Array, prepared: Any, spec: QuantSpec, recipe: Recipe) -> SegmentedQTensor:
    """One weight with its channels permuted, packed, in runs with widths of the spec, or that the method chooses.

    Which channels get which width depends on the numbers, so this is not one program.
    """
    function = recipe.quantizer.widths if spec.ordered else recipe.quantizer.segments
    if function is None:
        chosen = "cannot choose widths for runs of channels; write baq, or leave out mixed"
        raise UserError(f"{recipe.method}: {ORDER_REFUSED if spec.ordered else chosen}")
    permutation, found = function(weight.astype(jnp.float32), prepared, spec, recipe.options)
    return SegmentedQTensor.from_segments(permutation, found, spec, weight.shape)


def quantize_part(
    params: Params, part: str, specs: Mapping[str, QuantSpec], recipe: Recipe, place: Place = lambda weight: weight
) -> Params:
    """One part of a model ("embed", "block_3", "head") with the matrices that `specs` names by full path packed.

    For recipes that need no calibration. `place` lays a weight out over devices while it is quantized.

    Raises UserError, naming the matrix, when a weight is not finite or needs a scale beyond the largest of its dtype.
    """
    for path, spec in specs.items():
        if path == part or path.startswith(f"{part}/"):
            weight = read_matrix(params, path)
            check_weight(weight, path)
            tensor = back(quantize_leaf(place(weight), None, None, spec, recipe), weight)
            params = with_matrix(params, path, check_packed(tensor, path))
    return params


def read_matrix(params: Params, path: str) -> Any:
    """The leaf of matrix `path` in its part's `params`, as `[..., K, N]`: an embedding is transposed."""
    leaf: Any = params
    for key in leaf_keys(path):
        leaf = leaf[key]
    return leaf if is_packed(leaf) or path != EMBEDDING else leaf.T


def with_matrix(params: Params, path: str, leaf: Packed | Array) -> Params:
    """`params` of a part with another leaf at matrix `path`; a dense embedding is given as `[K, N]` too."""
    stored: Any = leaf
    return _replace(params, leaf_keys(path), stored if is_packed(leaf) or path != EMBEDDING else stored.T)


def leaf_keys(path: str) -> list[str]:
    """Keys within its part's tree of the leaf that holds matrix `path`."""
    return [*path.split("/")[1:], "embedding" if path == EMBEDDING else "kernel"]


def read_bias(params: Params, path: str) -> Array:
    """The bias `[N]` beside matrix `path`. Raises KeyError where there is none."""
    node: Any = params
    for key in [*leaf_keys(path)[:-1], "bias"]:
        node = node[key]
    return node


def with_bias(params: Params, path: str, bias: Array) -> Params:
    """`params` of a part with another bias beside matrix `path`."""
    return _replace(params, [*leaf_keys(path)[:-1], "bias"], bias)


def check_weight(weight: Array, path: str) -> None:
    """Raises UserError, naming the matrix, unless every weight is finite."""
    if not finite(weight):
        raise UserError(f"{path}: a weight is NaN or infinite; the model is damaged, give an intact one")


def check_packed(tensor: Packed, path: str) -> Packed:
    """The tensor itself. Raises UserError, naming the matrix, when a scale is beyond the largest of its dtype."""
    if not finite(tensor.scales):
        dtype = tensor.spec.scale_dtype
        instead = "write scale_dtype bfloat16 or float32" if dtype == "float16" else "the model is damaged"
        raise UserError(f"{path}: weights too large for {dtype} scales; {instead}")
    return tensor


@jax.jit
def finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def _replace(tree: Params, keys: list[str], leaf) -> Params:
    key, *rest = keys
    return {**tree, key: _replace(tree[key], rest, leaf) if rest else leaf}
