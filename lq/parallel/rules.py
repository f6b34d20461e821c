"""From the logical axes of weights and activations to the axes of a mesh: the one table there is.

data      rows of the batch; every device has all weights
fsdp      rows of the batch as well, and weights are stored apart along it, gathered (packed) for each product
expert    the experts of a routed block
tensor    heads, hidden channels of the feed-forward part, vocabulary: products of a part of every weight
"""

AXES = ("data", "fsdp", "expert", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("embed", "fsdp"),
    ("norm", None),
    ("positions", None),
)
