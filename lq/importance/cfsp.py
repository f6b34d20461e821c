"""CFSP's importance of blocks: the angles by which a block turns the tokens, put on a scale from 0 to 1.

    I_l = sum over all tokens of arccos cos(h_l, h_{l+1}) / pi
    z_l = (I_l - mean I) / deviation of I over the blocks
    y_l = sigmoid(slope z_l)

Published is (I_l - mean I) / 10,000 in place of z_l, a constant that goes with 128 windows of 2048 tokens and no other
text; dividing by the deviation does the same for any. y rises with I, so that the order of the blocks is that of their
mean angles, `angular` over all tokens instead of the last: what is new is the size, by which CFSP sets the share that a
block keeps (y over its mean).

The angle is taken from the sum and the difference of the unit vectors and not from the cosine, whose last bit near 1 is
0.0001 of the scale: a block that changes nothing has an angle of exactly 0.

Source: Wang et al., CFSP, arXiv 2409.13199, and the code beside it: the coarse importance alone.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lq.calibration.data import Windows
from lq.calibration.stream import stream
from lq.errors import UserError
from lq.importance.similarity import TINY, StreamOptions
from lq.models.source import ParameterSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class CFSPOptions(StreamOptions):
    slope: float = 1.0  # of the sigmoid, where z is 0: a quarter of this

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.slope < float("inf"):
            raise UserError(f"slope: {self.slope}; write a number above 0, such as 1")


def cfsp(source: ParameterSource, windows: Windows, options: CFSPOptions) -> dict:
    """By what angle a block turns the tokens, all of them, among the blocks: the sigmoid of its z-score.

    Returns under `extra` the mean angle, over pi.
    """
    angles = {}
    for index, measured, _ in stream(source, windows.tokens, batch_size=options.batch_size, measure=turned):
        sums = np.concatenate([np.asarray(found, np.float64) for found in measured])
        angles[f"block_{index}"] = float(sums.sum() / windows.tokens.size)
    y = sigmoid(options.slope * standardized(np.array(list(angles.values()))))
    return {"values": dict(zip(angles, y.tolist(), strict=True)), "extra": {"angle": angles}}


def turned(h: Float[Array, "B S D"], out: Float[Array, "B S D"]) -> Float[Array, " B"]:
    """The angles between inputs and outputs over pi, summed over the tokens of each window; 1/2 where one is zero."""
    return angle(h, out).sum(1)


def angle(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Between vectors, over pi, in float32; 1/2 where one is zero."""
    a, b = (v.astype(jnp.float32) for v in (a, b))
    a, b = (v / (jnp.linalg.norm(v, axis=-1, keepdims=True) + TINY) for v in (a, b))
    return 2 / jnp.pi * jnp.arctan2(jnp.linalg.norm(a - b, axis=-1), jnp.linalg.norm(a + b, axis=-1))


def standardized(values: Float[np.ndarray, " L"]) -> np.ndarray:
    """z-scores; zeros where all are the same."""
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros(len(values))


def sigmoid(z: Float[np.ndarray, "..."]) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * z))
