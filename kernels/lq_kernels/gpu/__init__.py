"""Backend `mosaic_gpu`: Pallas Mosaic GPU kernels for NVIDIA Hopper (compute capability 9.0).

`layout` lays a matrix out as the stream of bytes that the kernel reads, `fields` says how codes lie in words, `unpack`
brings them into registers, `kernel` multiplies, `schedule` says what is static about a launch, `config` decides how a
product is cut. This file ties them to the interface of a backend. Pallas' GPU part is imported when a kernel is built,
not before.

Numerics: codes minus zeros are whole numbers (or halves) that bfloat16 holds exactly, products are exact, sums are
float32 over at most 128 products, scaled and added up in float32. float32 and float16 activations come as several
bfloat16 terms. What a fractional zero leaves over is subtracted by an extra product of the sums of x over each group.
"""

import math
import re

import jax
import jax.numpy as jnp
from jax import Array, lax

from lq_kernels.backend import Backend, PreparedMatrix, Problem, uneven
from lq_kernels.gpu import layout
from lq_kernels.gpu.config import GpuConfig, candidates, default_config, direct_dtype, even_strips, stage_tiles
from lq_kernels.gpu.layout import TILE, stream_segment, zero_remainder
from lq_kernels.gpu.schedule import Schedule
from lq_kernels.packed import PackedMatrix
from lq_kernels.split import bf16_terms, sum_terms

TARGET = "sm90"
OLDEST_JAX = (0, 11, 2)


def refuses(problem: Problem) -> str | None:
    if reason := uneven(problem.segments):
        return reason
    if jax.__version_info__ < OLDEST_JAX:
        return f"needs jax {'.'.join(map(str, OLDEST_JAX))}, this is {jax.__version__}"
    if jax.config.jax_enable_x64:
        return "its index arithmetic is 32 bits wide; jax_enable_x64 is on"
    if reason := _unfit_device(problem.device_kind):
        return reason
    for segment in problem.segments:
        size = segment.group_size
        if size not in (32, 64) and size % TILE and size < segment.in_features:
            return f"groups of {size}: needs 32, 64, a multiple of {TILE}, or the whole column"
        if segment.scale_dtype not in ("bfloat16", "float16", "float32"):
            return f"scales of {segment.scale_dtype}: needs bfloat16, float16 or float32"
    return None


def _unfit_device(kind: str | None) -> str | None:
    if kind is None:
        return "the device is not known; the kernel is for Hopper only"
    if kind == "cpu":  # interpreted
        return None
    for device in _local_devices():
        if device.device_kind == kind:
            capability = str(getattr(device, "compute_capability", ""))
            return (
                None if capability == "9.0" else f"needs compute capability 9.0 (wgmma), this device has {capability}"
            )
    if re.search(r"\bG?H(100|200|800|20)\b", kind):
        return None
    return f"needs a Hopper GPU (compute capability 9.0, wgmma), not {kind}"


def _local_devices():
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def matmul(x: Array, w: PreparedMatrix, *, out_dtype, config: GpuConfig, interpret=False) -> Array:
    """x `[M, K]` @ w as `out_dtype` `[M, N]`. See `Backend`."""
    from lq_kernels.gpu.kernel import multiply

    problem = Problem(x.shape[0], w.in_features, w.out_features, str(x.dtype), str(out_dtype), w.segments, None)
    segments = tuple(stream_segment(segment) for segment in w.segments)
    terms = bf16_terms(x)
    token_tiles = math.ceil(terms.shape[0] / config.token_tile)
    tiles, strips = stage_tiles(segments, config.stage_bytes), math.ceil(w.out_features / TILE)
    stages = sum(s.tiles // n for s, n in zip(segments, tiles, strict=True))
    if config.cluster > 1 and (config.split or not even_strips(problem)):
        raise ValueError("clusters need whole units of work and an even number of 128-channel strips")
    if config.slots % config.pairs:
        raise ValueError(f"{config.slots} slots for {config.pairs} pairs of warpgroups: needs a multiple")
    schedule = Schedule(
        segments=segments,
        stage_tiles=tiles,
        strips=strips,
        rows=terms.shape[0],
        token_tile=config.token_tile,
        pairs=config.pairs,
        slots=config.slots,
        blocks=min(config.blocks, strips * token_tiles * (stages if config.split else 1))
        // config.cluster
        * config.cluster,
        split=config.split,
        cluster=config.cluster,
        out_dtype=direct_dtype(problem, config.split),
        interpret=_interpreter(interpret),
    )
    channels = sum(s.tiles for s in segments) * TILE
    rows = token_tiles * config.token_tile
    blocked = jnp.pad(terms, ((0, rows - terms.shape[0]), (0, channels - terms.shape[1])))
    blocked = blocked.reshape(rows, channels // TILE, TILE).swapaxes(0, 1)
    y = multiply(blocked, tuple(a["stream"] for a in w.arrays), schedule)
    y = _sum_planes(y, schedule)[: terms.shape[0], : w.out_features]
    y = sum_terms(y, x.shape[0])
    remainder = _zero_remainders(x, w)
    return (y if remainder is None else y - remainder).astype(out_dtype)


def _interpreter(interpret):
    if interpret is not True:
        return interpret or None
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


def _sum_planes(y: Array, schedule) -> Array:
    """The sum over planes, in their order; those that no block has written are left out."""
    if schedule.planes == 1:
        return y[0]
    written = schedule.contributions.reshape(schedule.strips, schedule.token_tiles).T
    shape = (schedule.token_tiles, schedule.out_rows, schedule.strips, TILE)
    total = y[0].reshape(shape)
    for plane in range(1, schedule.planes):
        present = jnp.asarray(written > plane)[:, None, :, None]
        total = total + jnp.where(present, y[plane].reshape(shape), 0.0)
    return total.reshape(y.shape[1:])


def _zero_remainders(x: Array, w: PreparedMatrix) -> Array | None:
    """sum over groups of (sum of x) * scale * (zero - its whole part), float32 [M, N]; None if all zeros are whole."""
    total, start = None, 0
    parts = zip(w.segments, w.arrays, strict=True)
    for i, (segment, arrays) in enumerate(parts):
        if layout.fractional(segment):
            matrix = restore(w)[i]
            if segment.asymmetric:
                rest = zero_remainder(arrays["zeros"], segment.bits)
            else:
                rest = segment.zero_point - math.floor(segment.zero_point)
            own = x[:, start : start + segment.in_features].astype(jnp.float32)
            own = jnp.pad(own, ((0, 0), (0, segment.groups * segment.group_size - segment.in_features)))
            sums = own.reshape(x.shape[0], segment.groups, segment.group_size).sum(-1)
            part = jnp.matmul(sums, matrix.scales.astype(jnp.float32) * rest, precision=lax.Precision.HIGHEST)
            total = part if total is None else total + part
        start += segment.in_features
    return total


def restore(w: PreparedMatrix) -> tuple[PackedMatrix, ...]:
    return layout.restore(w.arrays, w.segments, w.out_features)


BACKEND = Backend(
    name="mosaic_gpu",
    platforms=("cuda",),
    assumes="NVIDIA H200",
    refuses=refuses,
    target=lambda device_kind: TARGET,
    target_in_call=lambda device_kind: TARGET,
    prepare=layout.prepare,
    restore=restore,
    matmul=matmul,
    config_type=GpuConfig,
    default_config=default_config,
    candidates=candidates,
)
