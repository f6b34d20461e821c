"""Rewrites of a model that change its weights and not what it computes. `TRANSFORMS` is the registry.

A transform is a function `(config, options) -> Rewrite`: the new config, and each new leaf from the old leaves of the
same part, so that a model is transformed as it is streamed (`TransformedSource`).
"""

from lq.transforms.registry import TRANSFORMS
from lq.transforms.source import TransformedSource, transform

__all__ = ["TRANSFORMS", "TransformedSource", "transform"]
