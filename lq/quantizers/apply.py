"""From a parameter tree and a map of specs to the same tree with packed leaves. Pure; knows trees, not files.

A spec is given per matrix path, as `lq.models.matrices` names them. A path without a spec stays dense.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lq.errors import UserError
from lq.models.matrices import EMBEDDING
from lq.models.source import Params
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.low_rank import compensate
from lq.quantizers.registry import QUANTIZERS


@functools.partial(jax.jit, static_argnames=("spec", "method", "options"))
def quantize_matrix(weight: Array, spec: QuantSpec, method: str, options) -> QTensor:
    """One weight `[..., K, N]`, packed. Compiled once per shape, spec and options, whichever block it is in."""
    codes, scales, zeros = QUANTIZERS[method].function(weight.astype(jnp.float32), None, spec, options)
    tensor = QTensor.from_codes(codes, scales, zeros, dataclasses.replace(spec, rank=0))
    return compensate(tensor, weight, spec.rank) if spec.rank else tensor


def quantize_part(params: Params, part: str, specs: Mapping[str, QuantSpec], method: str, options) -> Params:
    """One part of a model ("embed", "block_3", "head") with the matrices that `specs` names by full path packed.

    Raises UserError, naming the matrix, when a weight is not finite or needs a scale beyond the largest of its dtype.
    """
    for path, spec in specs.items():
        if path == part or path.startswith(f"{part}/"):
            keys = [*path.split("/")[1:], "embedding" if path == EMBEDDING else "kernel"]
            params = _replace(params, keys, lambda w, p=path, s=spec: _packed(w, p, s, method, options))
    return params


def _packed(weight: Array, path: str, spec: QuantSpec, method: str, options) -> QTensor:
    if not _finite(weight):
        raise UserError(f"{path}: a weight is NaN or infinite; the model is damaged, give an intact one")
    tensor = quantize_matrix(weight.T if path == EMBEDDING else weight, spec, method, options)
    if not _finite(tensor.scales):
        instead = "write scale_dtype bfloat16 or float32" if spec.scale_dtype == "float16" else "the model is damaged"
        raise UserError(f"{path}: weights too large for {spec.scale_dtype} scales; {instead}")
    return tensor


@jax.jit
def _finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def _replace(tree: Params, keys: list[str], change) -> Params:
    key, *rest = keys
    return {**tree, key: _replace(tree[key], rest, change) if rest else change(tree[key])}
