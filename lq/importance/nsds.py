"""NSDS, numerical and structural dual sensitivity: from the weights alone, every module by the part it plays.

Detectors read the stream, writers write to it. In the orientation of the paper, W = U S V^T of shape [out, in]:

    detectors   up, gate, and of each head  QK = W_Q^T W_K  [D, D], queries times keys
    writers     down, and of each head      OV = W_O W_V    [D, D], what is read to what is written

Of every module two numbers, for the heads (of experts too) their mean:

    NV = excess kurtosis of its elements                                        numerical
    SE = sum of s / exp(entropy(s / sum of s)),   s_r = S_r beta_r              structural: large where few r carry much
    beta_r = ln(1 + relu(kurt v_r))                of up, gate                  what is read is few channels
             ln(1 + relu(kurt u_r) relu(kurt v_r)) of QK
             |P u_r|                               of writers                   what is written is heard in the output

over the largest singular values that hold 99 % of the energy, kurt the excess kurtosis over the coordinates, P the
projection on the right-singular vectors of the unembedding [V, D] that hold 99 % of its energy. Along the depth every
module's numbers are put on one scale, and joined by a soft "or":

    sigmoid((x - median) / MAD),      1 - product over k = 1..K of (1 - p_k)^(1/K)

first over the modules, NV and SE for themselves, then over those two. Larger is more important as it stands.

From the formulas: the authors' code joins modules and blocks into one number (a soft "or" without an axis) and takes
the norm of down's projection along the wrong one. With fewer key and value heads than query heads each query head has a
circuit of its own, with the keys and values it shares; modules that a model has not got are left out. Norms, biases and
rotary positions do not count.

Source: Zhang et al., Beyond Outliers, arXiv 2603.17354, and the code beside it.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.errors import UserError
from lq.importance.cfsp import sigmoid
from lq.importance.weights import weight_at
from lq.models.config import ModelConfig
from lq.models.matrices import EMBEDDING, HEAD
from lq.models.source import ParameterSource, Params
from lq.numerics.segmented import is_packed
from lq.quantizers.apply import read_matrix

Spectrum = tuple[Array, Array]  # singular values [r], largest first, and vectors [D, r] of the side that is D wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSDSOptions:
    energy: float = 0.99  # share of the squared singular values that is looked at

    def __post_init__(self):
        if not 0 < self.energy <= 1:
            raise UserError(f"energy: {self.energy}; write a share above 0 and up to 1, such as 0.99")


def nsds(source: ParameterSource, windows: None, options: NSDSOptions) -> dict:
    """Outliers among the weights, and few strong directions, of detectors and writers apart. Needs no text.

    Returns under `extra` the two parts that are joined in the end, and NV and SE of every module by block.

    Raises UserError for packed or damaged weights, and for a model that rotates its states as it runs: its matrices
    then have no basis in common.
    """
    del windows
    if source.config.rotation is not None:
        raise UserError("metric nsds: the model rotates its states as it runs; score the original model")
    audible = _unembedding(source, options.energy)
    numbers: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)  # module -> block -> (NV, SE)
    for index in range(source.config.num_blocks):
        block = f"block_{index}"
        for module, found in _modules(source.config, source.block(index), block, audible, options.energy):
            numbers[module][block] = found
    blocks = [f"block_{index}" for index in range(source.config.num_blocks)]
    parts = {name: _joined(numbers, blocks, i) for i, name in enumerate(("numerical", "structural"))}
    values = soft_or(list(parts.values()))
    extra = {name: dict(zip(blocks, part.tolist(), strict=True)) for name, part in parts.items()}
    modules = {module: {block: list(found) for block, found in of.items()} for module, of in numbers.items()}
    return {"values": dict(zip(blocks, values.tolist(), strict=True)), "extra": {**extra, "modules": modules}}


def _joined(numbers: dict, blocks: list[str], which: int) -> np.ndarray:
    """The soft "or" of all modules that a block has, by block."""
    scaled: dict[str, list[float]] = {block: [] for block in blocks}
    for of_blocks in numbers.values():
        column = mad_sigmoid(np.array([found[which] for found in of_blocks.values()]))
        for block, value in zip(of_blocks, column.tolist(), strict=True):
            scaled[block].append(value)
    return np.array([float(soft_or(values)) for values in scaled.values()])


def mad_sigmoid(x: Float[np.ndarray, " L"]) -> np.ndarray:
    """sigmoid((x - median) / MAD), MAD the median distance from the median; where that is 0 only 0, 1/2 and 1."""
    distance = x - np.median(x)
    deviation = np.median(np.abs(distance))
    return sigmoid(distance / deviation) if deviation > 0 else 0.5 + 0.5 * np.sign(distance)


def soft_or(p: Sequence) -> np.ndarray:
    """1 - product of (1 - p_k)^(1/K) over the first axis: p itself where all are equal, 1 where one is."""
    with np.errstate(divide="ignore"):
        return -np.expm1(np.log1p(-np.asarray(p, np.float64)).mean(0))


def _unembedding(source: ParameterSource, energy: float) -> Array:
    """An orthonormal basis `[D, r]` of what the head hears: its main right-singular vectors."""
    path = EMBEDDING if source.config.tie_embeddings else HEAD
    kernel = read_matrix(source.embed() if source.config.tie_embeddings else source.head(), path)
    if is_packed(kernel):
        raise UserError(f"metric nsds: {path} is packed; score the original model")
    values, vectors = spectrum(kernel.T)
    return vectors[:, : main(values, energy)]


def _modules(
    config: ModelConfig, params: Params, block: str, audible: Array, energy: float
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Every module of a block with its NV and SE."""

    def matrix(path: str) -> Array:
        return weight_at(params, f"{block}/{path}", "nsds").astype(jnp.float32)

    feed_forward = "mlp" if "mlp" in params else "moe"
    for name in ("up_proj", "gate_proj", "down_proj"):
        if name in params[feed_forward]:
            weight = matrix(f"{feed_forward}/{name}")
            stack = weight if weight.ndim > 2 else weight[None]
            yield f"{feed_forward}/{name}", _mean(_matrix(one, name == "down_proj", audible, energy) for one in stack)
    q, k, v, o = (matrix(f"attention/{name}_proj") for name in "qkvo")
    H, G, C = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (weight.reshape(-1, heads, C).swapaxes(0, 1) for weight, heads in ((q, H), (k, G), (v, G)))
    o = o.reshape(H, C, -1).swapaxes(1, 2)  # all [heads, D, C]
    shared = [h // (H // G) for h in range(H)]
    yield "QK", _mean(_qk(q[h], k[g], energy) for h, g in enumerate(shared))
    yield "OV", _mean(_ov(o[h], v[g], audible, energy) for h, g in enumerate(shared))


def _mean(found: Iterator[tuple[float, float]]) -> tuple[float, float]:
    numerical, structural = np.mean(list(found), axis=0)
    return float(numerical), float(structural)


def _matrix(weight: Float[Array, "K N"], writes: bool, audible: Array, energy: float) -> tuple[float, float]:
    values, vectors = spectrum(weight if writes else weight.T)
    beta = heard(vectors, audible) if writes else jnp.log1p(jax.nn.relu(excess_kurtosis(vectors, 0)))
    return float(excess_kurtosis(weight)), concentration(values, beta, energy)


def _qk(q: Float[Array, "D C"], k: Float[Array, "D C"], energy: float) -> tuple[float, float]:
    numerical, values, of_queries, of_keys = product(q, k)
    both = jax.nn.relu(excess_kurtosis(of_queries, 0)) * jax.nn.relu(excess_kurtosis(of_keys, 0))
    return float(numerical), concentration(values, jnp.log1p(both), energy)


def _ov(o: Float[Array, "D C"], v: Float[Array, "D C"], audible: Array, energy: float) -> tuple[float, float]:
    numerical, values, written, _ = product(o, v)
    return float(numerical), concentration(values, heard(written, audible), energy)


@jax.jit
def spectrum(rows: Float[Array, "n D"]) -> Spectrum:
    """Singular values and right-singular vectors of a matrix, by way of its triangular factor."""
    _, values, vectors = jnp.linalg.svd(jnp.linalg.qr(rows.astype(jnp.float32), mode="r"), full_matrices=False)
    return values, vectors.T


@jax.jit
def product(a: Float[Array, "D C"], b: Float[Array, "D C"]) -> tuple[Array, Array, Array, Array]:
    """Of a b^T `[D, D]`, which has rank C: excess kurtosis, singular values, left and right vectors `[D, C]`."""
    (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b)
    left, values, right = jnp.linalg.svd(jnp.matmul(ra, rb.T, precision="highest"), full_matrices=False)
    numerical = excess_kurtosis(jnp.matmul(a, b.T, precision="highest"))
    return numerical, values, jnp.matmul(qa, left, precision="highest"), jnp.matmul(qb, right.T, precision="highest")


def excess_kurtosis(x: Array, axis: int | None = None) -> Array:
    """mean((x - mean)^4) / mean((x - mean)^2)^2 - 3, float32; 0 where all are the same."""
    square = jnp.square(x - x.mean(axis, keepdims=True))
    second, fourth = square.mean(axis), jnp.square(square).mean(axis)
    return jnp.where(second > 0, fourth / jnp.where(second > 0, second, 1.0) ** 2 - 3.0, 0.0)


@jax.jit
def heard(vectors: Float[Array, "D r"], audible: Float[Array, "D m"]) -> Float[Array, " r"]:
    """The length of each column's projection on what the head hears."""
    return jnp.linalg.norm(jnp.matmul(audible.T, vectors, precision="highest"), axis=0)


def main(values: Array, energy: float) -> int:
    """How many of the largest singular values hold this share of their squares."""
    squares = np.square(np.asarray(values, np.float64))
    return int(np.searchsorted(np.cumsum(squares), energy * squares.sum())) + 1


def concentration(values: Array, beta: Array, energy: float) -> float:
    """SE, from all singular values, largest first, and their beta; 0 where all of beta is."""
    count = main(values, energy)
    s = (np.asarray(values, np.float64) * np.asarray(beta, np.float64))[:count]
    total = s.sum()
    if total == 0:
        return 0.0
    share = s[s > 0] / total
    return float(total / np.exp(-(share * np.log(share)).sum()))
