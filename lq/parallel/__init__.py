"""Models on many devices: meshes, and the rules from logical axes to their axes.

    with use(make_mesh("data=2,tensor=4")):
        model, params, tokenizer = lq.load("path/or/hub-name")      # on the mesh as they are read
        logits = jax.jit(model.apply)({"params": params}, tokens)

Where arrays lie says `lq.models.layout`; how products are made of the pieces, `lq.numerics.sharded`.
"""

from lq.models.layout import place, shardings
from lq.parallel.mesh import make_mesh, mesh_shape, use
from lq.parallel.rules import AXES, RULES
from lq.parallel.saving import restore_sharded, save_sharded

__all__ = ["AXES", "RULES", "make_mesh", "mesh_shape", "place", "restore_sharded", "save_sharded", "shardings", "use"]
