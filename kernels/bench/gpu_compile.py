"""Compiles the Hopper kernels where there is no GPU and counts what they cost.

    python kernels/bench/gpu_compile.py --bits 4 --rows 1 16 --shape 8192x8192 --group 128
    python kernels/bench/gpu_compile.py --segments 4:4096,2:4096 --rows 1
    python kernels/bench/gpu_compile.py --bits 2 --rows 1 --config pairs=1,slots=4
    python kernels/bench/gpu_compile.py --record        # every width and row count; writes results/static_cost_gpu.json

The CUDA plugin of JAX compiles for a device that is described in `h200.txtpb` (a GpuTargetConfigProto) down to sm_90a
machine code; neither driver nor device is looked at. Needs, beside jax: jax-cuda13-plugin and jax-cuda13-pjrt of the
same version; ptxas and nvlink, from a CUDA 13 toolkit or from nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-runtime and
nvidia-nvjitlink; and nvdisasm, from nvidia-cuda-nvdisasm or triton.

Reported for each product, as JSON: registers and spills (ptxas -v), shared memory, whether the matrix instruction takes
the weights from registers, bytes of temporaries, and *instructions per weight*: those a thread issues in the main loop
for each weight that it unpacks. A multiprocessor issues 128 a clock (four schedulers, 32 lanes); of weights it gets so
many a clock from memory, that there are `BUDGET` instructions for each. More than that and the kernel cannot keep up
with memory.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "static_cost_gpu.json"
# H200: 132 multiprocessors, 1.755 GHz, 4.3 TB/s copied.
BUDGET = {8: 7.0, 4: 3.56, 3: 2.69, 2: 1.83}
SHARED_LIMIT = 232448
MARK = "report: "
WIDTHS = tuple(range(1, 9))
ROWS = (1, 16, 64, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One product. `segments`: (bits, input channels, group size) each."""

    rows: int
    out_features: int
    segments: tuple[tuple[int, int, int], ...]
    asymmetric: bool = True
    scale_dtype: str = "bfloat16"
    x_dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    config: tuple[tuple[str, int], ...] = ()  # fields of GpuConfig that differ from the default

    @property
    def name(self) -> str:
        widths = "+".join(f"w{bits}g{group}" for bits, _, group in self.segments)
        kind = "" if self.asymmetric else " symmetric"
        changed = "".join(f" {key}={value}" for key, value in self.config)
        return f"{widths}{kind} {self.rows}x{sum(k for _, k, _ in self.segments)}x{self.out_features}{changed}"


def simple_case(bits: int, rows: int, K: int = 8192, N: int = 8192, group: int = 128, **facts) -> Case:
    return Case(rows=rows, out_features=N, segments=((bits, K, group),), **facts)


def recorded_cases() -> list[Case]:
    cases = [simple_case(bits, rows) for bits in WIDTHS for rows in ROWS]
    cases += [simple_case(bits, 1, asymmetric=False) for bits in WIDTHS]
    cases += [simple_case(bits, 1, group=32) for bits in WIDTHS]
    mixed = ((4, 4096, 128), (3, 2048, 128), (2, 2048, 128))
    return cases + [Case(rows=rows, out_features=8192, segments=mixed) for rows in ROWS]


def compile_cases(cases: list[Case], timeout: float = 1200) -> list[dict]:
    """One report per case, from one process of its own. A case that cannot be compiled has an `error`."""
    # The plugin must not find a GPU, nor fail for want of cuDNN: products of packed matrices need none.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [env.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, __file__, "--child"],
        input=json.dumps([dataclasses.asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        check=False,
    )
    reports = [json.loads(line.removeprefix(MARK)) for line in process.stdout.splitlines() if line.startswith(MARK)]
    lost = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
    return reports + [{"case": case.name, "error": lost[0]} for case in cases[len(reports) :]]


def _child() -> None:
    for fields in json.loads(sys.stdin.read()):
        fields["segments"] = tuple(map(tuple, fields["segments"]))
        fields["config"] = tuple(map(tuple, fields["config"]))
        case = Case(**fields)
        try:
            report = _report(case)
        except Exception as problem:  # the compiler's reason is the report; the next case goes on
            lines = str(problem).strip().splitlines() or [repr(problem)]
            report = {"case": case.name, "error": lines[0]}
        print(MARK + json.dumps(report), flush=True)


def _report(case: Case) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        compiled, config, weight_bytes = _compile(case)
        memory = compiled.memory_analysis()
        (ptx,) = Path(folder).glob("*.ptx")
        shared = re.search(r"smem_scratch_bytes=(\d+)", _only(folder, "*.resources.txt").read_text())
        statistics = _assemble(ptx, ptx.with_suffix(".cubin"))
        loops = main_loops(_disassemble(ptx.with_suffix(".cubin")))
    return {
        "case": case.name,
        "config": {**config, "split": int(config["split"])},
        **statistics,
        "shared_bytes": int(shared.group(1)),
        "temp_bytes": memory.temp_size_in_bytes,
        "weight_bytes": weight_bytes,
        "bf16_weight_bytes": 2 * case.out_features * sum(k for _, k, _ in case.segments),
        "loops": loops,
    }


def _only(folder: str, pattern: str) -> Path:
    (path,) = Path(folder).glob(pattern)
    return path


def _compile(case: Case):
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from lq_kernels.backend import PreparedMatrix, segment_of
    from lq_kernels.dispatch import problem_of
    from lq_kernels.gpu import BACKEND

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=(HERE / "h200.txtpb").read_text(), topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    kind = "NVIDIA H200"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    packed = tuple(_abstract_packed(case, *segment) for segment in case.segments)
    arrays = jax.eval_shape(lambda segments: BACKEND.prepare(segments, BACKEND.target(kind)), packed)
    arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arrays)
    K = sum(k for _, k, _ in case.segments)
    w = PreparedMatrix(
        arrays=arrays,
        permutation=None,
        backend=BACKEND.name,
        target=BACKEND.target(kind),
        segments=tuple(map(segment_of, packed)),
        in_features=K,
        out_features=case.out_features,
    )
    x = jax.ShapeDtypeStruct((case.rows, K), case.x_dtype, sharding=sharding)
    problem = problem_of(case.rows, x.dtype, w, jnp.dtype(case.out_dtype), kind)
    if reason := BACKEND.refuses(problem):
        raise NotImplementedError(reason)
    config = dataclasses.replace(BACKEND.default_config(problem, w.target), **dict(case.config))

    def product(x, w):
        return BACKEND.matmul(x, w, out_dtype=jnp.dtype(case.out_dtype), config=config)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        compiled = jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",)).compile()
    return compiled, dataclasses.asdict(config), w.nbytes


def _abstract_packed(case: Case, bits: int, K: int, group: int):
    import jax
    import jax.numpy as jnp

    from lq_kernels.packed import PackedMatrix
    from lq_kernels.packing import plane_widths, words_along

    N, groups = case.out_features, math.ceil(K / group)
    return PackedMatrix(
        planes=tuple(jax.ShapeDtypeStruct((words_along(K, p), N), jnp.uint32) for p in plane_widths(bits)),
        scales=jax.ShapeDtypeStruct((groups, N), case.scale_dtype),
        zeros=jax.ShapeDtypeStruct((groups, N), jnp.uint32) if case.asymmetric else None,
        zero_point=float(2 ** (bits - 1)),
        bits=bits,
        group_size=group,
        in_features=K,
    )


def find_tool(name: str) -> str | None:
    """A CUDA tool of a Python package, on the PATH, or in a toolkit.

    The packages first: JAX takes their libraries, and an older assembler may not read what these write.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    packaged = [*site.glob("nvidia/*/bin"), site / "triton/backends/nvidia/bin"]
    folders = [*packaged, *os.environ.get("PATH", "").split(os.pathsep), *Path("/usr/local").glob("cuda*/bin")]
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


def missing() -> str | None:
    """What this machine lacks, in one line; None when it can compile and count."""
    import importlib.util

    for module, package in (("jax_plugins.xla_cuda13", "jax-cuda13-plugin"), ("lq_kernels", "lq_kernels")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{package} is not installed"
    for tool, package in (("ptxas", "nvidia-cuda-nvcc"), ("nvdisasm", "nvidia-cuda-nvdisasm")):
        if find_tool(tool) is None:
            return f"there is no {tool}; {package} has it"
    return None


def _assemble(ptx: Path, cubin: Path) -> dict[str, int]:
    process = subprocess.run(
        [find_tool("ptxas"), "-arch=sm_90a", "-O3", "-v", ptx, "-o", cubin], capture_output=True, text=True, check=True
    )
    number = lambda pattern: int(re.search(pattern, process.stderr).group(1))  # noqa: E731
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    }


def _disassemble(cubin: Path) -> str:
    return subprocess.run([find_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout


def main_loops(sass: str) -> list[dict]:
    """The innermost loops that hold matrix instructions, in order: one for each segment."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(found.group(1))
    loops = []
    for end, text in enumerate(instructions):
        target = re.search(r"^BRA.*?\((\.L_x_\d+)\)", text)
        if target and labels.get(target.group(1), end + 1) <= end:
            loops.append((labels[target.group(1)], end + 1))
    multiplied = [i for i, text in enumerate(instructions) if text.startswith("HGMMA")]
    innermost = set()
    for i in multiplied:
        around = [(b - a, a, b) for a, b in loops if a <= i < b]
        innermost |= {min(around)[1:]} if around else set()
    return [_loop(instructions[a:b]) for a, b in sorted(innermost)]


def _loop(body: list[str]) -> dict:
    counts = collections.Counter(re.split(r"[.\s]", text)[0] for text in body)
    matrix = [text for text in body if text.startswith("HGMMA")]
    weights = 8 * len(matrix)  # an instruction takes 64 x 16 weights from 128 threads
    return {
        "instructions": len(body),
        "weights": weights,
        "per_weight": round(len(body) / weights, 3),
        "register_a": all(re.match(r"HGMMA\S* R\d+, R\d+, gdesc", text) for text in matrix),
        "tokens": int(re.match(r"HGMMA\.64x(\d+)x", matrix[0]).group(1)),
        "waits": sum(text.startswith("WARPGROUP.DEPBAR") for text in body),
        "by_kind": dict(counts.most_common(12)),
    }


def table(reports: list[dict]) -> str:
    head = (
        f"{'product':34}{'token tile':>11}{'regs':>6}{'spills':>8}{'shared':>9}{'temp MB':>9}  instructions per weight"
    )
    lines = [head]
    for r in reports:
        if "error" in r:
            lines.append(f"{r['case']:34} {r['error']}")
            continue
        widths = [int(bits) for bits in re.findall(r"w(\d)g", r["case"])]
        costs = [
            f"{loop['per_weight']:.2f}" + (f" of {BUDGET[b]}" if b in BUDGET else "")
            for b, loop in zip(widths, r["loops"], strict=False)
        ]
        lines.append(
            f"{r['case']:34}{r['config']['token_tile']:>11}{r['registers']:>6}{r['spill_bytes']:>8}{r['shared_bytes']:>9}"
            f"{r['temp_bytes'] / 1e6:>9.2f}  {', '.join(costs)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--shape", default="8192x8192", help="KxN")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--segments", help="bits:channels,... in place of --bits and K")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--scales", default="bfloat16")
    parser.add_argument("--x", default="bfloat16")
    parser.add_argument("--config", default="", help="field=value,... of GpuConfig")
    parser.add_argument("--json", action="store_true", help="print the reports")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child()
        return
    if lacking := missing():
        parser.error(lacking)
    reports = compile_cases(recorded_cases() if options.record else _cases_of(options))
    print(json.dumps(reports, indent=1) if options.json else table(reports))
    if options.record:
        RESULTS.write_text(json.dumps({r["case"]: r for r in reports}, indent=1) + "\n")


def _cases_of(options) -> list[Case]:
    K, N = map(int, options.shape.split("x"))
    config = tuple((key, int(value)) for key, value in (p.split("=") for p in options.config.split(",") if p))
    facts = {
        "asymmetric": not options.symmetric,
        "scale_dtype": options.scales,
        "x_dtype": options.x,
        "config": config,
    }
    if options.segments:
        widths = tuple(tuple(map(int, part.split(":"))) for part in options.segments.split(","))
        segments = tuple((bits, channels, options.group) for bits, channels in widths)
        return [Case(rows=m, out_features=N, segments=segments, **facts) for m in options.rows]
    return [simple_case(b, m, K, N, options.group, **facts) for b in options.bits for m in options.rows]


if __name__ == "__main__":
    main()
