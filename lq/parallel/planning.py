"""Whether a model fits on machines that need not be there: bytes by kind, and what would fit where it does not."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lq.allocation import Plan, allocate
from lq.allocation.plan import adapted
from lq.errors import UserError
from lq.importance import Scores
from lq.models.config import ModelConfig
from lq.models.generate import kv_cache_spec
from lq.models.matrices import matrices, model_shapes, other_weights
from lq.numerics.spec import QuantSpec
from lq.parallel.devices import Topology
from lq.parallel.memory import (
    Compiled,
    Step,
    abstract_model,
    compiled_step,
    device_bytes,
    prepared_model,
    sharded_model,
    sharded_state,
)
from lq.parallel.mesh import abstract_mesh, make_mesh, mesh_shape

MOST_CHIPS = 1 << 14  # of one axis, that are looked at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """Bytes are of one device."""

    mesh: dict[str, int]
    bpw: float  # of the blocks' matrices
    weights: int  # as they are stored; where a step was compiled, as they are laid out for it
    cache: int
    compiled: Compiled | None
    device: str | None
    device_memory: int | None
    fitting_devices: int | None  # along tensor, the fewest, a power of two; None where not looked for, or none do
    fitting_bpw: float | None  # of the blocks' matrices, the most on this mesh; None likewise

    @property
    def total(self) -> int:
        return self.weights + self.cache + (self.compiled.temporaries if self.compiled else 0)

    @property
    def fits(self) -> bool | None:
        return None if self.device_memory is None else self.total <= self.device_memory

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"total": self.total, "fits": self.fits}

    def lines(self) -> list[tuple[str, str]]:
        """Names and values, for a table."""
        axes = ",".join(f"{name}={size}" for name, size in self.mesh.items() if size > 1) or "one device"
        found = [
            ("mesh", axes),
            ("bits per weight of the blocks", f"{self.bpw:.4g}"),
            ("weights, a device", _size(self.weights)),
            ("key/value cache, a device", _size(self.cache)),
        ]
        if self.compiled is not None:
            found.append(("temporaries, a device", _size(self.compiled.temporaries)))
        found.append(("together", _size(self.total)))
        if self.device_memory is not None:
            found.append((f"memory of a {self.device}", _size(self.device_memory)))
            found.append(("it fits", "yes" if self.fits else "no"))
        if self.fits is False:
            chips = "none does" if self.fitting_devices is None else f"tensor={self.fitting_devices}"
            bits = "none does" if self.fitting_bpw is None else f"{self.fitting_bpw:.2f} bits per weight"
            found += [("a mesh that it would fit on", chips), ("a size that would fit here", bits)]
        return found


def plan_for(
    config: ModelConfig,
    bpw: float | None,
    file: Path | None,
    bits: Sequence[int],
    spec: QuantSpec,
    embedding_bits: int = 16,
    head_bits: int = 16,
) -> Plan | None:
    """A plan of that many bits per weight of the blocks, matrices as nearly equal as can be; or the one in `file`.

    None, a dense model, where neither is given. Raises UserError for a size or a file that cannot be.
    """
    if file is not None:
        return adapted(Plan.read(file), config)
    if bpw is None:
        return None
    shapes = model_shapes(config)
    scores = Scores(
        metric="parameter_count",
        values={path: float(math.prod(shapes[path])) for path in matrices(config)},
        model="",
        shapes=shapes,
        other_weights=other_weights(config),
    )
    tables = {"embedding_bits": embedding_bits, "head_bits": head_bits}
    return allocate(scores, bpw=bpw, bits=bits, spec=spec, method="greedy", costs="value", **tables)


def memory(
    config: ModelConfig, plan: Plan | None, step: Step, mesh: str | None, target: Topology | None, *, compiles: bool
) -> Planned:
    """What the model takes on every device.

    Args:
      config: of the model.
      plan: of its matrices; dense in 16 bits when None.
      step: what is computed, and for how long a text.
      mesh: sizes by axis, as `mesh_shape` reads them; all devices along tensor when None.
      target: what the devices are, where that is known.
      compiles: whether the step is compiled for the target, which takes a compiler of its own.

    Raises:
      UserError: a mesh of another number of devices than the target has.
    """
    kv_cache_spec(step.kv_bits)
    if step.length > config.max_positions:
        raise UserError(f"length: {step.length} tokens, but the model's context is {config.max_positions}; write less")
    count = target.count if target else 1
    sizes = mesh_shape(mesh) if mesh is not None else mesh_shape(f"tensor={count}")
    devices = math.prod(sizes.values())
    if target is not None and devices != count:
        raise UserError(f"mesh: {mesh} takes {devices} devices, and {target.kind} x {count} has {count}")
    specs = {} if plan is None else plan.specs
    compiled, laid_out = None, None
    if compiles and target is not None and target.tpu is not None:
        from jax.experimental import topologies

        there = topologies.get_topology_desc(platform="tpu", topology_name=target.tpu).devices
        there = make_mesh(sizes, there)
        compiled = compiled_step(config, specs, step, there)
        laid_out = device_bytes(prepared_model(sharded_model(config, abstract_model(config, specs), there), there))
    cache, weights = _cache(config, specs, step, sizes), laid_out or _weights(config, specs, step, sizes)
    extra = cache + (compiled.temporaries if compiled else 0)
    limit = target.memory if target else None
    fitting: dict = {"fitting_devices": None, "fitting_bpw": None}
    if limit is not None and weights + extra > limit:
        fitting = {
            "fitting_devices": _fitting_devices(config, specs, step, sizes, limit, extra - cache),
            "fitting_bpw": _fitting_bpw(config, plan, step, sizes, limit - extra, weights),
        }
    return Planned(
        mesh=sizes,
        bpw=16.0 if plan is None else dataclasses.replace(plan, count="blocks").bpw,
        weights=weights,
        cache=cache,
        compiled=compiled,
        device=target.kind if target else None,
        device_memory=limit,
        **fitting,
    )


def _weights(config: ModelConfig, specs: Mapping[str, QuantSpec], step: Step, sizes: Mapping[str, int]) -> int:
    return device_bytes(sharded_model(config, abstract_model(config, specs), abstract_mesh(sizes)))


def _cache(config: ModelConfig, specs: Mapping[str, QuantSpec], step: Step, sizes: Mapping[str, int]) -> int:
    return device_bytes(sharded_state(config, step, abstract_mesh(sizes)).caches)


def _fitting_devices(config, specs, step: Step, sizes: dict[str, int], limit: int, temporaries: int) -> int | None:
    """Temporaries are taken to be what they are on the mesh at hand: more devices need no more."""
    count = sizes["tensor"]
    while (count := 2 * count) <= MOST_CHIPS:
        wider = {**sizes, "tensor": count}
        if _weights(config, specs, step, wider) + _cache(config, specs, step, wider) + temporaries <= limit:
            return count
    return None


def _fitting_bpw(config, plan: Plan | None, step: Step, sizes, room: int, weights: int) -> float | None:
    """Bytes of the blocks are proportional to their bits; the least of a plan is a bit for a weight."""
    shapes = model_shapes(config)
    blocks = sum(math.prod(shapes[path]) for path in matrices(config))
    bpw = 16.0 if plan is None else dataclasses.replace(plan, count="blocks").bpw
    packed = bpw * blocks / 8 / (math.prod(sizes.values()) // sizes["data"])
    found = bpw * (1 - (weights - room) / packed)
    return found if found >= 1.0 else None


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.4g} MiB"
