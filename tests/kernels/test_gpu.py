"""The Hopper kernels, interpreted on the CPU with the race detector on, against float64.

Interpretation blocks one CPU thread of XLA per warpgroup; with fewer cores than that it would wait for itself. So the
products run in a process of their own, which is given enough threads (NPROC), and the tests look at what it found.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lq_kernels.backend import Problem, Segment, segment_of
from lq_kernels.gpu import BACKEND, OLDEST_JAX, layout
from lq_kernels.gpu.config import SHARED_BYTES, direct_dtype, shared_bytes
from lq_kernels.gpu.fields import FIELDS, fields
from lq_kernels.gpu.schedule import Schedule
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import pack

TOLERANCE = 4e-6  # of |x| |w|: float32 sums of exact products

too_old = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"Mosaic GPU of jax {jax.__version__} is too old to be interpreted"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One interpreted product. `segments`: (bits, input channels, group size)."""

    segments: tuple[tuple[int, int, int], ...]
    rows: int
    N: int = 128
    zeros: str | None = "uint8"  # their dtype; None: symmetric
    zero_point: float | None = None  # of a symmetric one; None: 2**(bits - 1)
    scales: str = "bfloat16"
    x: str = "bfloat16"
    out: str = "float32"
    mean: float = 0.0  # of x: cancellation
    poison: bool = False  # one row of x with NaN and infinities
    config: tuple[tuple[str, int], ...] = ()


PRODUCTS = {
    **{f"w{b}": Product(segments=((b, 128, 128),), rows=3) for b in range(1, 9)},
    **{f"w{b}-symmetric": Product(segments=((b, 128, 128),), rows=8, zeros=None) for b in (2, 7)},
    "w1-half": Product(segments=((1, 128, 64),), rows=1, zeros=None, zero_point=0.5),
    "w4-half": Product(segments=((4, 128, 128),), rows=1, zeros=None, zero_point=7.5),
    "w8-half": Product(segments=((8, 128, 128),), rows=1, zeros=None, zero_point=127.5),
    "w3-group32": Product(segments=((3, 128, 32),), rows=2, scales="float32"),
    "w4-group64": Product(segments=((4, 256, 64),), rows=17, scales="float16"),
    "w2-group256": Product(segments=((2, 512, 256),), rows=9),
    "w5-column-ragged": Product(segments=((5, 300, 300),), rows=7, N=130, scales="float32"),
    "w4-short": Product(segments=((4, 96, 128),), rows=1, N=64),
    "w6-ragged": Product(segments=((6, 300, 64),), rows=5, N=100),
    "w3-fractional": Product(segments=((3, 300, 64),), rows=3, zeros="float32"),
    "w4-fractional-constant": Product(segments=((4, 256, 128),), rows=3, zeros=None, zero_point=5.3),
    "mixed": Product(segments=((4, 256, 128), (3, 128, 128), (2, 100, 32)), rows=4),
    "mixed-split": Product(segments=((8, 256, 128), (2, 384, 128)), rows=4, N=256, config=(("split", True),)),
    "float32": Product(segments=((4, 256, 128),), rows=5, x="float32"),
    "float16": Product(segments=((2, 256, 128),), rows=5, x="float16", out="float16"),
    "bfloat16-out": Product(segments=((4, 256, 128),), rows=40, out="bfloat16", config=(("split", False),)),
    "two-token-tiles": Product(segments=((4, 256, 128),), rows=130, config=(("split", False),)),
    "one-pair": Product(segments=((3, 384, 128),), rows=8, N=256, config=(("pairs", 1), ("split", True))),
    "units-round-robin": Product(segments=((4, 256, 128),), rows=8, N=512, config=(("split", False),)),
    "clusters": Product(
        segments=((4, 384, 128),), rows=70, N=512, config=(("split", False), ("cluster", 2), ("blocks", 2))
    ),
    "mean-100": Product(segments=((2, 256, 128),), rows=3, mean=100.0),
    "poisoned": Product(segments=((4, 200, 64),), rows=5, N=100, poison=True),
}


def _matrix(product: Product, bits: int, K: int, group: int, rng) -> PackedMatrix:
    groups = -(-K // group)
    codes = rng.integers(0, 2**bits, (K, product.N))
    codes[: K // 4, 0], codes[: K // 4, 1] = 0, 2**bits - 1
    scales = rng.uniform(0.01, 0.1, (groups, product.N))
    scales[0, 2] = 0.0
    zeros = rng.integers(0, 2**bits, (groups, product.N)).astype(float)
    zeros[0, 3] = 2**bits - 1
    if product.zeros == "float32":
        zeros += rng.uniform(0, 1, zeros.shape)
    return PackedMatrix(
        planes=pack(jnp.asarray(codes, jnp.uint32), bits),
        scales=jnp.asarray(scales, product.scales),
        zeros=None if product.zeros is None else jnp.asarray(zeros, product.zeros),
        zero_point=float(2 ** (bits - 1)) if product.zero_point is None else product.zero_point,
        bits=bits,
        group_size=group,
        in_features=K,
    )


def _run(product: Product) -> dict:
    """What the interpreted kernel makes of a product: the worst error over its bound, and whether threads raced."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    from lq_kernels.dispatch import problem_of
    from lq_kernels.packed import SegmentedMatrix
    from lq_kernels.prepared import lay_out
    from lq_kernels.reference import error_scale, reference_matmul

    rng = np.random.default_rng(0)
    w = SegmentedMatrix(segments=tuple(_matrix(product, *segment, rng) for segment in product.segments))
    x = rng.normal(product.mean, 1, (product.rows, w.in_features))
    if product.poison:
        x[1, 3], x[1, -1] = np.nan, np.inf
    x = jnp.asarray(x, product.x)
    prepared = lay_out(w, BACKEND, BACKEND.target("cpu"))
    out_dtype = jnp.dtype(product.out)
    problem = problem_of(product.rows, x.dtype, prepared, out_dtype, "cpu")
    assert BACKEND.refuses(problem) is None
    small = {"blocks": 3, "slots": 2, "cluster": 1, **dict(product.config)}
    config = dataclasses.replace(BACKEND.default_config(problem, prepared.target), **small)
    y = BACKEND.matmul(x, prepared, out_dtype=out_dtype, config=config, interpret=True)
    dtype = str(y.dtype)
    y, reference, scale = np.asarray(y).astype(np.float64), reference_matmul(x, w), error_scale(x, w)
    finite = np.isfinite(reference).all(axis=1)
    rounding = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-10}[product.out]
    bound = TOLERANCE * scale[finite] + rounding * np.abs(reference[finite]) + 1e-30
    return {
        "shape": y.shape,
        "dtype": dtype,
        "worst": float((np.abs(y[finite] - reference[finite]) / bound).max()),
        "finite": np.isfinite(y).all(axis=1).tolist(),
        "races": bool(interpreter.get_races().races_found),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    process = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=600, env=env, check=False
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    results = {entry["name"]: entry for entry in map(json.loads, lines)}
    return {"": {"stderr": process.stderr[-2000:]}, **results}


@too_old
@pytest.mark.parametrize("name", PRODUCTS)
def test_interpreted_product_is_that_of_float64(found, name):
    assert name in found, found[""]["stderr"]
    result, product = found[name], PRODUCTS[name]
    assert result["shape"] == [product.rows, product.N]
    assert result["dtype"] == product.out
    assert result["worst"] <= 1.0
    assert not result["races"]
    assert result["finite"] == [not (product.poison and m == 1) for m in range(product.rows)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_fill_the_words_exactly(bits):
    taken = [(p.word, p.at + i) for field in fields(bits) for p in field.pieces for i in range(p.width)]
    assert len(fields(bits)) == FIELDS
    assert sorted(taken) == [(word, i) for word in range(bits) for i in range(16)]


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_field_becomes_its_offset_plus_the_code(bits):
    for field in fields(bits):
        codes = np.arange(2**bits)
        assert field.p + bits <= 7
        pattern = np.uint16(field.exponent) | (codes << field.p).astype(np.uint16)
        assert (pattern.view(jnp.bfloat16).astype(float) == field.offset + codes).all()


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("zeros", "scales", "K", "group"),
    [("uint32", "bfloat16", 300, 64), ("float32", "float16", 300, 256), (None, "float32", 100, 100)],
)
def test_restore_is_the_inverse_of_prepare(bits, zeros, scales, K, group):
    product = Product(segments=(), rows=1, N=130, zeros=zeros, scales=scales)
    w = _matrix(product, bits, K, group, np.random.default_rng(bits))
    arrays = jax.jit(lambda w: layout.prepare((w,), "sm90"))(w)
    (restored,) = layout.restore(arrays, (segment_of(w),), w.out_features)
    for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(restored), strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_width_costs_its_bits(bits):
    w = _matrix(Product(segments=(), rows=1), bits, 1024, 128, np.random.default_rng(0))
    (arrays,) = layout.prepare((w,), "sm90")
    assert arrays["stream"].nbytes * 8 / (1024 * 128) == bits + 32 / 128  # a bfloat16 scale and zero per group


def _problem(**changes) -> Problem:
    segment = Segment(4, 128, 4096, True, 0.0, "bfloat16", "uint32")
    segment = dataclasses.replace(segment, **{k: v for k, v in changes.items() if hasattr(segment, k)})
    rest = {k: v for k, v in changes.items() if not hasattr(segment, k)}
    facts = {"rows": 1, "x_dtype": "bfloat16", "out_dtype": "bfloat16", "device_kind": "NVIDIA H200"} | rest
    return Problem(in_features=segment.in_features, out_features=4096, segments=(segment,), **facts)


@too_old
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "needs a Hopper GPU (compute capability 9.0, wgmma)"),
        ({"device_kind": "NVIDIA B200"}, "needs a Hopper GPU (compute capability 9.0, wgmma)"),
        ({"device_kind": None}, "the device is not known"),
        ({"group_size": 48}, "groups of 48"),
        ({"scale_dtype": "float64"}, "scales of float64"),
    ],
)
def test_refusals_name_the_reason(changes, reason):
    assert BACKEND.refuses(_problem(**changes)).startswith(reason)


@too_old
@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe"])
def test_hopper_is_served(kind):
    assert BACKEND.refuses(_problem(device_kind=kind)) is None


def test_an_older_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert BACKEND.refuses(_problem()).startswith("needs jax 0.11.2")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows", [1, 7, 8, 16, 33, 64, 127, 128, 129, 257, 4096])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
def test_every_candidate_fits_the_device(bits, rows, x_dtype):
    problem = _problem(bits=bits, rows=rows, x_dtype=x_dtype)
    found = BACKEND.candidates(problem, "sm90")
    assert found[0] == BACKEND.default_config(problem, "sm90")
    for config in found:
        out_bytes = jnp.dtype(direct_dtype(problem, config.split)).itemsize
        assert shared_bytes(tuple(map(layout.stream_segment, problem.segments)), config, out_bytes) <= SHARED_BYTES
        assert config.slots >= 2
        assert config.slots % config.pairs == 0
        assert config.token_tile % 8 == 0
        assert config.token_tile <= 128


@pytest.mark.parametrize("pairs", [1, 2])
def test_warpgroups_ask_for_no_more_registers_than_the_block_has(pairs):
    facts = {"segments": (), "stage_tiles": (), "strips": 1, "rows": 8, "token_tile": 8, "slots": 2}
    schedule = Schedule(**facts, pairs=pairs, blocks=1, cluster=1, split=False, out_dtype="float32")
    copying, computing = schedule.warpgroup_registers
    launched = {1: 168, 2: 96}[pairs]  # what ptxas reports
    assert copying + schedule.computing * computing <= launched * (schedule.computing + 1)
    assert copying % 8 == computing % 8 == 0


if __name__ == "__main__":
    for case, each in PRODUCTS.items():
        print(json.dumps({"name": case, **_run(each)}), flush=True)
