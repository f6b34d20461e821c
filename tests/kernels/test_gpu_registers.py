"""What the Hopper kernels do inside registers, from their machine-independent assembly (PTX), run thread by thread.

Pallas' interpreter cannot run code that is written register by register; it runs the same steps on arrays. Here the
code itself is compiled, in small kernels that only load, unpack and store, and the few instructions it consists of are
carried out in NumPy for the 128 threads of a warpgroup.
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lq_kernels.gpu import layout
from lq_kernels.packed import PackedMatrix
from lq_kernels.packing import pack

TARGET = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "h200.txtpb"
THREADS = 128
TOKENS = 24


def _missing() -> str | None:
    try:
        found = importlib.util.find_spec("jax_plugins.xla_cuda13")
    except ModuleNotFoundError:
        found = None
    return None if found else "jax-cuda13-plugin is not installed"


pytestmark = pytest.mark.skipif(_missing() is not None, reason=f"{_missing()} here: make test-aot")

# name -> (bits, zero point of a symmetric one or None for stored zeros)
UNPACKING = {
    **{f"w{bits}": (bits, None) for bits in range(1, 9)},
    **{f"w{bits}-symmetric": (bits, 2.0 ** (bits - 1)) for bits in range(2, 9)},
    "w1-half": (1, 0.5),
    "w4-half": (4, 7.5),
}


@dataclasses.dataclass
class Threads:
    """Registers of 128 threads, and a memory of words: parameter i lies at i << 40."""

    buffers: list[np.ndarray]  # uint8
    registers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def run(self, ptx: str) -> None:
        body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
        for line in body.splitlines():
            text = line.split("//")[0].strip().rstrip(";")
            if not text or text.startswith((".", "$", "}", "@")):
                continue
            name, _, operands = text.partition(" ") if " " in text else text.partition("\t")
            if name == "ret":
                return
            if name.startswith(("bar.", "fence.", "elect.", "shfl.")):  # nothing here depends on them
                continue
            self._step(name, [o.strip() for o in re.split(r",(?![^{]*\})", operands)])

    def _value(self, operand: str) -> np.ndarray:
        if operand == "%tid.x":
            return np.arange(THREADS, dtype=np.uint64)
        if operand.startswith("%"):
            return self.registers[operand]
        return np.full(THREADS, int(operand, 0) & 0xFFFFFFFF, np.uint64)

    def _step(self, name: str, operands: list[str]) -> None:
        if name.startswith("st.global"):
            return self._store(name, operands)
        if name.startswith("ld.global"):
            return self._load(name, operands)
        if name.startswith("ld.param"):
            index = int(re.search(r"param_(\d+)", operands[1]).group(1))
            self.registers[operands[0]] = np.full(THREADS, index << 40, np.uint64)
            return None
        if operands[0].startswith("{"):  # a register taken apart
            for i, half in enumerate(re.findall(r"%\w+", operands[0])):
                self.registers[half] = (self._value(operands[1]) >> np.uint64(16 * i)) & np.uint64(0xFFFF)
            return None
        wide = ".s64" in name or ".u64" in name or ".b64" in name or "wide" in name
        result = self._compute(name, [self._value(o) for o in operands[1:]])
        self.registers[operands[0]] = result if wide else result & np.uint64(0xFFFFFFFF)
        return None

    def _compute(self, name: str, values: list[np.ndarray]) -> np.ndarray:
        kind = name.split(".")[0]
        if name == "cvt.f32.bf16":
            return values[0] << np.uint64(16)
        a, b, c = (*values, None, None)[:3]
        if "bf16x2" in name:
            x, y, *z = (v.astype(np.uint32).view(jnp.bfloat16).astype(np.float32) for v in values)
            exact = {"add": lambda: x + y, "sub": lambda: x - y, "fma": lambda: x * y + z[0]}[kind]()
            return exact.astype(jnp.bfloat16).view(np.uint32).astype(np.uint64)
        if kind == "lop3":
            assert int(values[3][0]) == 0xEA
            return (a & b) | c
        if kind == "prmt":
            selector = values[2]
            both = (b << np.uint64(32)) | a
            parts = [(both >> (8 * (selector >> np.uint64(4 * i) & np.uint64(7)))) & np.uint64(255) for i in range(4)]
            return sum(part << np.uint64(8 * i) for i, part in enumerate(parts))
        if kind == "bfe":
            return (a >> b) & ((np.uint64(1) << c) - np.uint64(1))
        simple = {
            "mov": lambda: a,
            "cvta": lambda: a,
            "cvt": lambda: a,
            "add": lambda: a + b,
            "mul": lambda: a * b,
            "mad": lambda: a * b + c,
            "and": lambda: a & b,
            "or": lambda: a | b,
            "xor": lambda: a ^ b,
            "shl": lambda: a << b,
            "shr": lambda: a >> b,
        }
        assert kind in simple, f"unknown instruction {name}"
        return simple[kind]()

    def _places(self, name: str, operand: str, count: int):
        size = int(re.search(r"[bfu](\d+)$", name).group(1)) // 8
        register, _, offset = operand.strip("[]").partition("+")
        start = self._value(register) + np.uint64(int(offset or 0))
        return size, [start + np.uint64(i * size) for i in range(count)]

    def _load(self, name: str, operands: list[str]) -> None:
        targets = re.findall(r"%\w+", operands[0])
        size, places = self._places(name, operands[1], len(targets))
        for target, place in zip(targets, places, strict=True):
            buffer, at = self.buffers[int(place[0] >> np.uint64(40))], place & np.uint64((1 << 40) - 1)
            each = sum(buffer[at + np.uint64(i)].astype(np.uint64) << np.uint64(8 * i) for i in range(size))
            self.registers[target] = each

    def _store(self, name: str, operands: list[str]) -> None:
        sources = re.findall(r"%\w+", operands[1])
        size, places = self._places(name, operands[0], len(sources))
        for source, place in zip(sources, places, strict=True):
            buffer, at = self.buffers[int(place[0] >> np.uint64(40))], place & np.uint64((1 << 40) - 1)
            for i in range(size):
                buffer[at + np.uint64(i)] = (self._value(source) >> np.uint64(8 * i)).astype(np.uint8)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ptx")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MOSAIC_GPU_DUMP_PTX": "1"}
    process = subprocess.run(
        [sys.executable, __file__, folder], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return folder


def _run(ptx: Path, name: str, inputs: list[np.ndarray], out_bytes: int) -> np.ndarray:
    (path,) = (ptx / name).glob("*.ptx")
    buffers = [np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8) for a in inputs]
    threads = Threads([*buffers, np.full(out_bytes, 0xEE, np.uint8)])
    threads.run(path.read_text())
    return threads.buffers[-1]


@pytest.mark.parametrize("name", UNPACKING)
def test_registers_hold_code_minus_zero(ptx, name):
    bits, zero_point = UNPACKING[name]
    rng = np.random.default_rng(bits)
    codes, zeros = rng.integers(0, 2**bits, (128, 128)), rng.integers(0, 2**bits, (1, 128))
    codes[:, :2] = 0, 2**bits - 1
    w = PackedMatrix(
        planes=pack(jnp.asarray(codes, jnp.uint32), bits),
        scales=jnp.ones((1, 128), jnp.bfloat16),
        zeros=jnp.asarray(zeros, jnp.uint8) if zero_point is None else None,
        zero_point=zero_point or 0.0,
        bits=bits,
        group_size=128,
        in_features=128,
    )
    rows = np.asarray(layout.prepare((w,), "sm90")[0]["stream"])[0]
    inputs = [rows[: 4 * bits]] + ([] if zero_point is not None else [rows[-1, :32]])
    tile = _run(ptx, name, inputs, 64 * 128 * 4).view(np.float32).reshape(64, 128)
    expected = codes - (zeros if zero_point is None else zero_point)
    np.testing.assert_array_equal(tile, expected[:, :64].T)


def test_scales_of_two_rows_come_out_of_a_word(ptx):
    scales = np.random.default_rng(0).uniform(0.01, 1, 64).astype(jnp.bfloat16)
    pairs = np.stack([scales.reshape(4, 2, 8)[:, 0], scales.reshape(4, 2, 8)[:, 1]], axis=-1)
    found = _run(ptx, "pairs", [pairs], 64 * 4).view(np.float32)
    np.testing.assert_array_equal(found, scales.astype(np.float32))


def test_wide_scales_come_out_of_two_words(ptx):
    scales = np.random.default_rng(0).uniform(0.01, 1, (4, 2, 8)).astype(np.float32)
    found = _run(ptx, "words", [scales[:, 0], scales[:, 1]], 64 * 4).view(np.float32)
    np.testing.assert_array_equal(found, scales.reshape(64))


@pytest.mark.parametrize(("name", "dtype"), [("transposed", np.float32), ("transposed-half", jnp.bfloat16)])
def test_accumulators_are_stored_transposed(ptx, name, dtype):
    array = np.random.default_rng(0).normal(size=(64, TOKENS)).astype(dtype)
    found = _run(ptx, name, [array], array.nbytes).view(dtype).reshape(TOKENS, 64)
    np.testing.assert_array_equal(found.astype(float), array.T.astype(float))


def test_what_was_stored_transposed_is_loaded_by_its_threads(ptx):
    array = np.random.default_rng(0).normal(size=(TOKENS, 64)).astype(np.float32)
    found = _run(ptx, "loaded", [array], array.nbytes).view(np.float32).reshape(64, TOKENS)
    np.testing.assert_array_equal(found, array.T)


def _kernels(plgpu):
    """name -> (body, inputs' (shape, dtype), output's)."""
    from lq_kernels.gpu.layout import StreamSegment
    from lq_kernels.gpu.transposed import load_transposed, store_transposed
    from lq_kernels.gpu.unpack import ROW_PAIRS, scales_of_pairs, scales_of_words, unpack_columns, words_layout

    def load(ref, of):
        return plgpu.load(ref, layout=of, optimized=False)

    def unpacking(facts):
        def body(words_ref, *refs):
            words = load(words_ref, words_layout(facts))  # first: parameters are numbered in the order of their use
            zeros = load(refs[0], ROW_PAIRS) if facts.zeros else None
            tile = unpack_columns(words, zeros, facts, 0, 16, None)
            refs[-1][...] = tile.astype(jnp.float32)

        return body

    def pairs(ref, out):
        out[...] = scales_of_pairs(load(ref, ROW_PAIRS), None)

    def words(low, high, out):
        out[...] = scales_of_words(load(low, ROW_PAIRS), load(high, ROW_PAIRS), None)

    def transposed(ref, out):
        store_transposed(load(ref, plgpu.Layout.WGMMA), out, None)

    def loaded(ref, out):
        out[...] = load_transposed(ref, TOKENS, None)

    row_pairs = ((32,), jnp.int32)
    found = {}
    for name, (bits, zero_point) in UNPACKING.items():
        facts = StreamSegment(bits, 128, 1, False, zero_point is None, zero_point or 0.0)
        inputs = [((4 * bits, 64), jnp.int32)] + [row_pairs] * facts.zeros
        found[name] = (unpacking(facts), inputs, ((64, 128), jnp.float32))
    found["pairs"] = (pairs, [row_pairs], ((64,), jnp.float32))
    found["words"] = (words, [row_pairs, row_pairs], ((64,), jnp.float32))
    found["transposed"] = (transposed, [((64, TOKENS), jnp.float32)], ((TOKENS, 64), jnp.float32))
    found["transposed-half"] = (transposed, [((64, TOKENS), jnp.bfloat16)], ((TOKENS, 64), jnp.bfloat16))
    found["loaded"] = (loaded, [((TOKENS, 64), jnp.float32)], ((64, TOKENS), jnp.float32))
    return found


def _compile_all(folder: Path) -> None:
    import jax
    from jax.experimental import topologies
    from jax.experimental.pallas import mosaic_gpu as plgpu

    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        for name, (body, inputs, out) in _kernels(plgpu).items():
            (folder / name).mkdir()
            os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder / name)
            run = plgpu.kernel(
                body,
                out_type=jax.ShapeDtypeStruct(*out),
                grid=(1,),
                grid_names=("block",),
                num_threads=1,
                thread_name="warpgroup",
            )
            shapes = [jax.ShapeDtypeStruct(*each, sharding=sharding) for each in inputs]
            jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


if __name__ == "__main__":
    _compile_all(Path(sys.argv[1]))
