"""Gradient times activation of what a block writes: a stand-in for layer-wise relevance propagation.

    R = mean over windows of  | sum over tokens and channels of  y dL/dy |,      as a share of the sum over all units

with L the loss of a window and y what the unit adds to the residual stream: what its attention or its feed-forward
network writes, or both together for a block. y dL/dy is by how much the loss would fall, to first order, were y left
out. What dominates the stream where the next norm reads it has next to none: the norm takes its size away.

This is not the published score. LRP-QViT (Ranjan and Savakis, arXiv 2401.11243) and Mix-QViT (arXiv 2501.06357)
propagate the relevance of a class backwards through every layer of a vision transformer; the formula by which they
weigh a layer was not available. In a network of ReLU without biases the epsilon rule of relevance propagation is
gradient times activation (Ancona et al., arXiv 1711.06104), which is what is computed here.
"""

import jax.numpy as jnp
import numpy as np

from lq.calibration.data import Windows
from lq.importance.backward import Backward, WindowGradients
from lq.importance.similarity import InfluenceOptions
from lq.models.source import ParameterSource

WHOLE = "block"


def relevance(source: ParameterSource, windows: Windows, options: InfluenceOptions) -> dict:
    """Gradient times activation of what a block, or each of its two parts, writes: a stand-in for LRP."""
    backward = Backward(source, windows, batch_size=options.batch_size)
    found = backward.gradients(source, relevances)
    sizes: dict[str, float] = {}
    for index, block in enumerate(found.blocks):
        for part, relevance in block.items():
            if (part == WHOLE) == (options.unit == "block"):
                sizes[f"block_{index}" if part == WHOLE else f"block_{index}/{part}"] = np.abs(relevance).mean()
    total = sum(sizes.values()) or 1.0
    return {"values": {unit: float(size / total) for unit, size in sizes.items()}, "passes": backward.passes}


def relevances(found: WindowGradients, data: None):
    """y dL/dy of each part, and of both together, by name. A `Reduce`."""
    del data
    y, gradients = found.branches, found.branch_gradients
    (last,) = y.keys() - {"attention"}  # mlp or moe; by what it writes the gradient is that at the block's output
    of_parts = {part: jnp.vdot(y[part], gradients[part]) for part in y}
    return of_parts | {WHOLE: jnp.vdot(y["attention"] + y[last], gradients[last])}
