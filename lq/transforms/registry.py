"""The table of transforms: a function `(config, options) -> Rewrite` each, see `lq.transforms.rewrite`."""

from lq.registry import Method, Registry
from lq.transforms.add_biases import AddBiasesOptions, add_biases
from lq.transforms.fold_norms import FoldNormsOptions, fold_norms
from lq.transforms.hadamard import HadamardOptions, hadamard

TRANSFORMS = Registry(
    "transform",
    {
        "fold_norms": Method(function=fold_norms, options=FoldNormsOptions),
        "hadamard": Method(function=hadamard, options=HadamardOptions),
        "add_biases": Method(function=add_biases, options=AddBiasesOptions),
    },
)
