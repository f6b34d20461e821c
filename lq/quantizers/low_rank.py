"""Low-rank compensation of quantization error (LoRC): a packed weight plus two thin factors, each in 8 bits.

Of the error E = W - Q(W) `[K, N]` the factors L `[K, r]` and R `[r, N]` keep the best part of rank r. Without
statistics that is its singular value decomposition cut after r values, E ~ U S V^T, split evenly:

    L = U sqrt(S),   R = sqrt(S) V^T

With the Hessian H = sum x x^T of the matrix's inputs the error of its outputs is minimized, ||X (E - L R)||: the same
of C E with C^T C = H, and L = C^-1 U sqrt(S). H is damped, as in GPTQ, by a hundredth of its mean diagonal.

E is what a matrix's own quantizer leaves. Where the matrices of a block are learned together, it is what their start
leaves, without statistics: rounding is then learned with the residual in place (`lq.quantizers.reconstruct`).

An error of rounding is nearly white: eight components of 512 hold 6 % of its energy, so that a small rank pays off at 2
or 3 bits, or where an error has structure. Rounding the factors themselves costs some 1e-4 of what they hold.

Source: Yao et al., ZeroQuant-V2, arXiv 2303.08302, for the plain decomposition, the even split and the 8 bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lq.calibration.statistics import HIGHEST
from lq.numerics.qtensor import QTensor
from lq.numerics.spec import QuantSpec
from lq.quantizers.errors import output_energy
from lq.quantizers.rtn import RTNOptions, rtn

DAMPING = 0.01  # of the mean diagonal of H


@functools.partial(jax.jit, static_argnames="rank")
def with_residual(
    base: QTensor, weight: Float[Array, "... K N"], rank: int, hessian: Float[Array, "... K K"] | None = None
) -> QTensor:
    """`base`, which has no residual, with the one of `rank` that brings it closest to `weight`. Pure."""
    spec = dataclasses.replace(base.spec, rank=rank)
    residual = low_rank_residual(weight.astype(jnp.float32) - base.dequantize(), spec, hessian)
    return dataclasses.replace(base, spec=spec, residual=residual)


def low_rank_residual(
    error: Float[Array, "... K N"], spec: QuantSpec, hessian: Float[Array, "... K K"] | None = None
) -> tuple[QTensor, QTensor]:
    """The packed factors of `error`, of the specs and shapes that `spec.residual` gives. Pure and jittable.

    The scales of both are 0 for a matrix whose error they would not reduce: where H is far from full rank and the error
    lies outside of it, as GPTQ leaves it, the rounding of the factors can weigh more than what they hold.

    Args:
      error: W - Q(W); leading axes are a stack of experts, each decomposed by itself.
      spec: of the matrix, `rank` above 0. A rank beyond K or N is that of a full matrix.
      hessian: sum of x x^T; None: errors of all input channels count alike. One that is all zero, of an expert without
        tokens, is as none.

    Raises:
      ValueError: the spec has no residual.
    """
    if not spec.rank:
        raise ValueError(f"{spec} has no low-rank residual")
    error = error.astype(jnp.float32)
    if hessian is not None:
        seen = jnp.trace(hessian, axis1=-2, axis2=-1) > 0
        hessian = jnp.where(seen[..., None, None], hessian, jnp.eye(hessian.shape[-1]))
    specs = spec.residual(error.shape)
    rank = specs[1][1][-2]
    factors = low_rank_factors(error, rank, hessian)
    left, right = (_packed(factor, factor_spec) for factor, (factor_spec, _) in zip(factors, specs, strict=True))
    product = jnp.matmul(left.dequantize(), right.dequantize(), precision=HIGHEST)
    reduced = (output_energy(error - product, hessian) < output_energy(error, hessian))[..., None, None]
    left, right = (dataclasses.replace(f, scales=jnp.where(reduced, f.scales, 0)) for f in (left, right))
    return left, right


def low_rank_factors(
    error: Float[Array, "... K N"], rank: int, hessian: Float[Array, "... K K"] | None = None
) -> tuple[Float[Array, "... K rank"], Float[Array, "... rank N"]]:
    """L and R of the module's docstring, before they are rounded; float32."""
    if hessian is None:
        return _split_svd(error, rank)
    eigenvalues, vectors = jnp.linalg.eigh(hessian)
    mean = jnp.trace(hessian, axis1=-2, axis2=-1)[..., None] / hessian.shape[-1]
    root = jnp.sqrt(jnp.maximum(eigenvalues, 0.0) + DAMPING * mean)[..., None]
    whitened = root * jnp.matmul(jnp.swapaxes(vectors, -1, -2), error, precision=HIGHEST)  # C E
    left, right = _split_svd(whitened, rank)
    return jnp.matmul(vectors, left / root, precision=HIGHEST), right


def _packed(factor: Float[Array, "... K N"], spec: QuantSpec) -> QTensor:
    codes, scales, zeros = rtn(factor, None, spec, RTNOptions(clip="none"))
    return QTensor.from_codes(codes, scales, zeros, spec)


def _split_svd(matrix: Float[Array, "... K N"], rank: int) -> tuple[Array, Array]:
    U, values, Vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[..., :rank])
    return U[..., :rank] * root[..., None, :], root[..., :, None] * Vt[..., :rank, :]
