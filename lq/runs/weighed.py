"""`Weighed`: what an unquantized model costs, counted from its own arrays while it is read."""

import math
from typing import Any

from flax.traverse_util import flatten_dict

from lq.allocation.plan import Count, Plan
from lq.checkpoint.layout import leaf_path
from lq.models.matrices import model_shapes
from lq.models.source import ParameterSource, Params

COUNTED: dict[Count, str] = {
    "blocks": "the blocks' matrices",
    "all": "the blocks' matrices, embedding and head",
}  # what bits per weight are an average over, in words


class Weighed(ParameterSource):
    """A dense source that counts the bytes of every leaf as it is read, in the dtype the device holds it in.

    The counts are whole once every part has been read, as an evaluation does.
    """

    def __init__(self, source: ParameterSource):
        self.config = source.config
        self._source = source
        self._bytes: dict[str, int] = {}  # path of a leaf -> its bytes

    def part(self, name: str, dtype=None) -> Params:
        params = self._source.part(name, dtype)
        leaves: dict[str, Any] = flatten_dict(params, sep="/")
        self._bytes |= {f"{name}/{path}": leaf.nbytes for path, leaf in leaves.items()}
        return params

    @property
    def nbytes(self) -> int:
        """Bytes of all that was read."""
        return sum(self._bytes.values())

    def bits_per_weight(self, count: Count = "blocks") -> float:
        """Over the matrices that plans of this `count` count."""
        counted = Plan(specs={}, shapes=model_shapes(self.config), count=count)
        nbytes = sum(self._bytes[f"{path.split('/')[0]}/{leaf_path(path)}"] for path in counted.counted())
        return 8 * nbytes / sum(math.prod(counted.shapes[path]) for path in counted.counted())
