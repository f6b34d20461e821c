"""Parameters laid out for the device that will multiply them: what decoding runs on.

A checkpoint's packed matrices are in the canonical layout, which every tool and every backend can read. Before decoding
they are laid out once for the kernels of the device at hand; matrices that share their input and their format become
one product: query, key and value projections, gate and up. The model definition is the same.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lq.models.source import Params
from lq.numerics.matmul import PlusLowRank
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import SegmentedQTensor
from lq.numerics.sharded import active_mesh
from lq_kernels import PackedMatrix, PreparedMatrix
from lq_kernels import prepare as prepare_matrix

LAID_OUT = (PackedMatrix, PreparedMatrix)  # the first where a backend takes the canonical layout as it is
# Names that stand side by side in a block and share their input.
JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def prepare(params: Params, *, platform: str | None = None, device_kind: str | None = None) -> Params:
    """`params` with every packed matrix of the blocks and the head laid out for a device.

    Args:
      params: a parameter tree, left alone. Dense leaves, stacks of experts and the embedding table stay as they are.
      platform, device_kind: as in `lq_kernels.prepare`; the default device's when None.

    Returns:
      A tree that `Decoder.apply` takes in the place of `params`. It cannot be saved, scored or quantized: keep `params`
      for that. On a mesh (`lq.parallel.use`) `params` itself: pieces of matrices are taken as they are stored.
    """
    if active_mesh() is not None:
        return params
    where = {"platform": platform, "device_kind": device_kind}
    return {name: child if name == "embed" else _prepare(child, where) for name, child in params.items()}


def prepared_nbytes(params: Params) -> int:
    """Bytes on the device of the matrices that `prepare` laid out."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LAID_OUT))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, LAID_OUT))


def _prepare(tree: Any, where: dict) -> Any:
    if isinstance(tree, SegmentedQTensor):
        return prepare_matrix(tree.packed(), **where)
    if isinstance(tree, QTensor):
        if tree.ndim != 2:
            return tree
        base = prepare_matrix(tree.packed(), **where)
        return base if tree.residual is None else PlusLowRank(base, *(_prepare(f, where) for f in tree.residual))
    if not isinstance(tree, Mapping):
        return tree
    tree = dict(tree)
    for names in JOINT:
        kernels = [tree[name].get("kernel") for name in names if name in tree]
        if len(kernels) == len(names) and _can_be_one(kernels):
            tree["+".join(names)] = prepare_matrix([kernel.packed() for kernel in kernels], **where)
            for name in names:
                tree[name] = {key: leaf for key, leaf in tree[name].items() if key != "kernel"}
    return {
        name: child if isinstance(child, PreparedMatrix) else _prepare(child, where) for name, child in tree.items()
    }


def _can_be_one(kernels: list) -> bool:
    if not all(isinstance(kernel, QTensor) and kernel.ndim == 2 for kernel in kernels):
        return False
    if any(kernel.residual is not None for kernel in kernels):
        return False
    return len({(kernel.spec, kernel.shape[0]) for kernel in kernels}) == 1
