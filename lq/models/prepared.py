"""Parameters laid out for the device that will multiply them: what decoding runs on.

A checkpoint's packed matrices are in the canonical layout, which every tool and every backend can read. Before decoding
they are laid out once for the kernels of the device at hand; matrices that share their input and their format become
one product: query, key and value projections, gate and up. The model definition is the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lq.models.layers import KERNEL_AXES
from lq.models.source import Params
from lq.numerics.matmul import Pieces, PlusLowRank
from lq.numerics.qtensor import QTensor
from lq.numerics.segmented import is_packed
from lq.numerics.sharded import active_mesh, cut_of, lay_out_pieces
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
      for that. On a mesh (`lq.parallel.use`) every device lays out its pieces, and the tree is of use there alone.
    """
    where = {"platform": platform, "device_kind": device_kind}
    return {name: child if name == "embed" else _prepare(name, child, where) for name, child in params.items()}


def prepared_nbytes(params: Params) -> int:
    """Bytes on the device of the matrices that `prepare` laid out."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LAID_OUT))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, LAID_OUT))


def _prepare(name: str, tree: Any, where: dict) -> Any:
    if is_packed(tree):
        return tree if tree.ndim != 2 else _laid_out((name,), (tree,), where)
    if not isinstance(tree, Mapping):
        return tree
    tree = dict(tree)
    for names in JOINT:
        kernels = [tree[each].get("kernel") for each in names if each in tree]
        if len(kernels) == len(names) and _can_be_one(names, kernels):
            tree["+".join(names)] = _laid_out(names, kernels, where)
            for each in names:
                tree[each] = {key: leaf for key, leaf in tree[each].items() if key != "kernel"}
    done = (*LAID_OUT, Pieces)
    of_map = lambda each, child: child if isinstance(child, done) else _prepare(each, child, where)  # noqa: E731
    return {each: of_map(name if each == "kernel" else each, child) for each, child in tree.items()}


def _laid_out(names: Sequence[str], kernels: Sequence[Any], where: dict) -> Any:
    """One kernel, or several as one; on the mesh in force, if any, in pieces."""

    def lay_out(*kernels: Any) -> Any:
        return (
            prepare_matrix([kernel.packed() for kernel in kernels], **where) if kernels[1:] else _one(kernels[0], where)
        )

    if (mesh := active_mesh()) is None:
        return lay_out(*kernels)
    cut = cut_of(kernels[0], KERNEL_AXES[names[0]], mesh)
    return Pieces(lay_out_pieces(lay_out, kernels, cut, mesh), cut)


def _one(kernel: Any, where: dict) -> Any:
    """A kernel with what is beside its codes."""
    base = prepare_matrix(kernel.packed(), **where)
    residual = getattr(kernel, "residual", None)
    return base if residual is None else PlusLowRank(base, *(_one(factor, where) for factor in residual))


def _can_be_one(names: Sequence[str], kernels: list) -> bool:
    if not all(isinstance(kernel, QTensor) and kernel.ndim == 2 for kernel in kernels):
        return False
    if any(kernel.residual is not None for kernel in kernels):
        return False
    if len({(kernel.spec, kernel.shape[0]) for kernel in kernels}) > 1:
        return False
    if (mesh := active_mesh()) is None:
        return True
    named = zip(kernels, (KERNEL_AXES[name] for name in names), strict=True)
    return len({cut_of(kernel, axes, mesh) for kernel, axes in named}) == 1
