"""Name tables: which tensors of a Hugging Face checkpoint hold which leaves of our parameter tree.

A table is a tuple of `Rule`s, each naming one stored tensor and the leaves it fills. Sizes appear in no table: they
follow from the leaves (`decoder.abstract_params`). The switches of a rule are

- transposed: torch's Linear stores `[out, in]`, a kernel here is `[in, out]`;
- several targets: the tensor is their concatenation along the output axis (Phi-3's qkv_proj, GPT-2's c_attn);
- "{e}" in the source: the tensor is one expert's slice of a stacked leaf.

A rule whose targets a model does not have (a bias, a head norm, the head of tied embeddings) is not used for it. The
same table serves both directions: `leaves_from` reads a checkpoint, `tensors_from` writes one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a name table; "{i}" stands for the block, "{e}" for the expert."""

    source: str  # the tensor's name, as transformers writes it
    targets: tuple[str, ...]  # paths of the leaves, "/" between the keys
    transposed: bool = False


def linear(source: str, *targets: str) -> tuple[Rule, ...]:
    """A torch Linear: weight `[out, in]`, and bias."""
    return (
        Rule(f"{source}.weight", tuple(f"{target}/kernel" for target in targets), transposed=True),
        Rule(f"{source}.bias", tuple(f"{target}/bias" for target in targets)),
    )


def conv1d(source: str, *targets: str) -> tuple[Rule, ...]:
    """GPT-2's Conv1D: weight `[in, out]`, and bias."""
    return tuple(dataclasses.replace(rule, transposed=False) for rule in linear(source, *targets))


def norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", (f"{target}/scale",)), Rule(f"{source}.bias", (f"{target}/bias",))


def embedding(source: str, target: str) -> tuple[Rule, ...]:
    return (Rule(f"{source}.weight", (f"{target}/embedding",)),)


def in_blocks(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of one block, placed under `prefix` on their side and under `block_{i}` on ours."""
    return tuple(
        dataclasses.replace(
            rule,
            source=f"{prefix}.{rule.source}",
            targets=tuple(f"block_{{i}}/{target}" for target in rule.targets),
        )
        for rule in rules
    )


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor a checkpoint must hold: a rule with block, expert and sizes filled in."""

    name: str
    shape: tuple[int, ...]  # as stored
    leaves: tuple[str, ...]
    widths: tuple[int, ...]  # output channels of each leaf
    transposed: bool
    expert: int | None

    @property
    def part(self) -> str:
        """The top-level key of the parameter tree it belongs to: "embed", "block_3", "head"."""
        return self.leaves[0].partition("/")[0]

    def split(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The path and value of each leaf; the values are views of `array`."""
        array = array.T if self.transposed else array
        pieces = np.split(array, np.cumsum(self.widths)[:-1], axis=-1)
        return zip(self.leaves, pieces, strict=True)

    def join(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `split`, for the slice of its expert where leaves are stacked."""
        pieces = [
            np.asarray(leaves[path] if self.expert is None else leaves[path][self.expert]) for path in self.leaves
        ]
        array = np.concatenate(pieces, axis=-1)
        return np.ascontiguousarray(array.T if self.transposed else array)


def stored_tensors(
    rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], num_blocks: int
) -> tuple[StoredTensor, ...]:
    """Every tensor a checkpoint must hold to fill leaves of these `shapes` (by path); experts of a stack in order."""
    return tuple(tensor for rule in rules for tensor in _filled_in(rule, shapes, num_blocks))


def _filled_in(rule: Rule, shapes: Mapping[str, tuple[int, ...]], num_blocks: int) -> Iterator[StoredTensor]:
    stacked = "{e}" in rule.source
    for i in range(num_blocks) if "{i}" in rule.source else (None,):
        leaves = tuple(target.format(i=i) for target in rule.targets)
        if not all(leaf in shapes for leaf in leaves):
            continue
        slices = [shapes[leaf][1:] if stacked else shapes[leaf] for leaf in leaves]
        widths = tuple(shape[-1] for shape in slices)
        shape = (*slices[0][:-1], sum(widths))
        shape = shape[::-1] if rule.transposed else shape
        for e in range(shapes[leaves[0]][0]) if stacked else (None,):
            yield StoredTensor(rule.source.format(i=i, e=e), shape, leaves, widths, rule.transposed, e)


def leaves_from(
    tensors: Iterable[StoredTensor], read: Callable[[StoredTensor], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Path and value of each leaf that `tensors` fill, each yielded as soon as it is whole."""
    tensors = list(tensors)
    experts = 1 + max((tensor.expert for tensor in tensors if tensor.expert is not None), default=0)
    stacks: dict[str, np.ndarray] = {}
    for tensor in tensors:
        for path, piece in tensor.split(read(tensor)):
            if tensor.expert is None:
                yield path, piece
                continue
            if path not in stacks:
                stacks[path] = np.empty((experts, *piece.shape), piece.dtype)
            stacks[path][tensor.expert] = piece
            if tensor.expert == experts - 1:
                yield path, stacks.pop(path)


def tensors_from(tensors: Iterable[StoredTensor], leaves: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of each stored tensor, made from the leaves."""
    for tensor in tensors:
        yield tensor.name, tensor.join(leaves)
