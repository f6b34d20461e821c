"""Models on many devices: meshes, the rules from logical axes to their axes, and where arrays lie.

mesh = make_mesh("data=2,tensor=4")
with use(mesh):
    logits = jax.jit(Decoder(config).apply)({"params": place(config, params, mesh)}, tokens)
"""

from lq.parallel.layout import Placed, leaf_sharding, place, shardings
from lq.parallel.mesh import make_mesh, mesh_shape, use
from lq.parallel.rules import AXES, RULES

__all__ = ["AXES", "RULES", "Placed", "leaf_sharding", "make_mesh", "mesh_shape", "place", "shardings", "use"]
