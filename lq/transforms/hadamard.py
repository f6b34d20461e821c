"""Rotations that spread outliers over all channels, after which low-bit codes fit better (QuaRot, arXiv 2404.00456).

With R orthogonal, x W = (x R) (R^T W). What produces x is multiplied by R and what reads it by R^T, in float64:

    residual    R1 [D, D], of the stream between the blocks: into the embedding and every matrix and bias that writes to
                the stream, R1^T into those that read it. An RMSNorm without a gain commutes with R1, so the norms are
                folded first (`fold_norms`, which also makes LayerNorm one).
    values      R2 [C, C], one a block, of each value head: into v_proj and its bias, R2^T into the heads of o_proj.
    heads       [H, H], across the heads in front of o_proj. Nothing linear in front takes it: the model applies it as
                it runs. With `values`, o_proj's whole input is rotated.
    down        [F, F], of down_proj's input, behind the nonlinearity: applied as the model runs, experts too.

A model with tied embeddings, or a final norm that cannot be folded into the head, keeps its embedding, final norm and
head: R1 is applied as it runs too, behind the embedding and, inverted, in front of the final norm.

SpinQuant (arXiv 2405.16406) calls the first two R1 and R2, without the others "no had". R1 is impossible where a norm
with a gain stands between a block's output and the stream (Gemma 2 and 3).
"""

import dataclasses

import numpy as np

from lq.errors import UserError
from lq.models.config import ModelConfig, Rotation
from lq.numerics.hadamard import rotate_on_host
from lq.transforms.fold_norms import FoldNorms, FoldNormsOptions, final_norm_folds
from lq.transforms.rewrite import READS, WRITES, Chain, Read, Rewrite, matrix_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class HadamardOptions:
    """What is rotated; see the module's docstring."""

    seed: int = 0  # of the signs; every place and, of values, every block has its own
    residual: bool = True
    values: bool = True
    heads: bool = False  # costs one small product a token and block as the model runs
    down: bool = False  # the same


def hadamard(config: ModelConfig, options: HadamardOptions) -> Rewrite:
    """Randomized Hadamard rotations of the residual stream, the values, and the inputs of o_proj and down_proj.

    Raises:
      UserError: a family whose residual stream cannot be rotated, a model that has been rotated, or nothing to rotate.
    """
    if config.rotation is not None:
        raise UserError(f"{config.family}: rotated before, with seed {config.rotation.seed}; give the original model")
    if not (options.residual or options.values or options.heads or options.down):
        raise UserError("hadamard: nothing to rotate; write residual, values, heads or down: true")
    if options.residual and config.post_norms:
        raise UserError(
            f"{config.family}: its norms behind attention and feed-forward have gains, which no rotation of the "
            "residual stream commutes with; write residual: false"
        )
    if not options.residual:
        return Rotate(config, options)
    folded = FoldNorms(config, FoldNormsOptions(rmsnorm=True))
    return Chain(folded, Rotate(folded.config, options))


class Rotate(Rewrite):
    """The rotations of `hadamard`; that of the residual stream takes RMSNorms that have been folded."""

    def __init__(self, config: ModelConfig, options: HadamardOptions):
        self._options = options
        self._online = options.residual and not final_norm_folds(config)
        places = {"residual": self._online, "heads": options.heads, "down": options.down}
        rotation = Rotation(seed=options.seed, **places) if any(places.values()) else None
        super().__init__(dataclasses.replace(config, rotation=rotation))

    def leaf(self, part: str, path: str, read: Read) -> np.ndarray | None:
        value = None
        for place, axis, shape in self._rotations(part, *matrix_of(part, path)):
            value = read(path) if value is None else value
            turned = rotate_on_host(value.reshape(shape or value.shape), self._options.seed, place, axis=axis)
            value = turned.reshape(value.shape)
        return value

    def _rotations(self, part: str, matrix: str, leaf: str) -> list[tuple[str, int, tuple[int, ...] | None]]:
        """What happens to a leaf: along which axis, of the leaf in which shape (None: its own), which rotation."""
        options, config, kernel = self._options, self.config, leaf == "kernel"
        residual = options.residual and not (self._online and part in ("embed", "head"))
        values, o_proj = f"values {part}", matrix == "attention/o_proj" and kernel
        by_kv_head, by_head = (-1, config.num_kv_heads, config.head_dim), (config.num_heads, config.head_dim, -1)
        down_proj = matrix in ("mlp/down_proj", "moe/down_proj") and kernel
        cases = [
            (residual and (part == "embed" or matrix in WRITES), ("residual", -1, None)),
            (residual and matrix in READS and kernel, ("residual", -2, None)),
            (options.values and matrix == "attention/v_proj", (values, -1, by_kv_head)),
            (options.values and o_proj, (values, 1, by_head)),
            (options.heads and o_proj, ("heads", 0, by_head)),
            (options.down and down_proj, ("down", -2, None)),
        ]
        return [rotation for wanted, rotation in cases if wanted]
