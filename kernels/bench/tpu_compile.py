"""Compiles the TPU kernels without a TPU and counts the instruction words (bundles) they cost. Prints one JSON line.

    python kernels/bench/tpu_compile.py --chip v5e --segments 4:4096 --columns-total 4096 --rows 1 16 256

The compiler is libtpu's, the one that runs on the machines; it needs no device. It may abort the process on what it
does not support, so whoever asks for many kernels starts one process each (`tpu_cost.py`, the tests).

What is reported per number of rows:

    whole      bundles of the whole grid per 1024 weights: pipeline, scales, zero points, everything
    sides      bytes of scales and zeros, twice: the compiler may move these before the kernel starts
    marginal   bundles per 1024 weights more: of one turn of the loop over input channels (of the first segment), or,
               where that is unrolled, of as many channels again as half of them; null without `--marginal`, which
               compiles the half, and where there is neither
    budget     bundles in which a chip's memory delivers 1024 weights and their scales; below it, memory is the limit
    temp       bytes of temporaries in HBM; a bfloat16 copy of the weights would show here
    spills     registers stored and loaded again

Bundles are cycles if nothing waits; waiting for memory is what the budget is about. Nothing here was timed.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import sys
import tempfile

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
# Bytes per second of a chip's HBM, clock, cores that share it (jax._src.tpu_info; clocks follow from the peak rate).
MEMORY = {
    "v4": (1.23e12, 1.05e9, 2),
    "v5e": (0.82e12, 1.5e9, 1),
    "v5p": (2.46e12, 1.75e9, 2),
    "v6e": (1.64e12, 1.75e9, 1),
}


def budget(chip: str, bits: float, group: int | None, asymmetric: bool) -> float | None:
    """Bundles per 1024 weights at full memory rate, bfloat16 scales; None where the clock is not published."""
    if chip not in MEMORY:
        return None
    rate, clock, cores = MEMORY[chip]
    side = 0 if group is None else (16 + (16 if asymmetric else 0)) / group
    return 1024 * (bits + side) / 8 / rate * clock * cores


def schedule(folder: str, name: str = "lq_matmul") -> dict:
    """Counts of the final schedule of kernel `name` dumped in `folder`: bundles by loop, spills, used slots."""
    (bundles,) = glob.glob(f"{folder}/*-{name}*-final_bundles.txt")
    (slots,) = glob.glob(f"{folder}/*-{name}*-final_hlo-static-per-bundle-utilization.txt")
    loops, outside, step = [], 0, 0
    for line in _bundles(bundles):
        label, depth, text = line
        if depth >= 2 and label == "LB" and depth == 2:
            loops.append({"bundles": 0, "tail": 0, "trips": None})
        if depth == 0:
            outside += 1
        else:
            step += 1
        if loops:
            loops[-1]["tail"] += 1
            if depth >= 2:  # lines between two of the loop belong to it
                loops[-1]["bundles"] += loops[-1].pop("tail")
                loops[-1]["tail"] = 0
                if found := re.search(r"scmp\.ge\.s32\.totalorder %s\w+, (\d+) /\* loop exit test", text):
                    loops[-1]["trips"] = int(found[1])
    used = _used_slots(slots)
    return {
        "outside": outside,
        "step": step,
        "loops": [{"bundles": loop["bundles"], "trips": loop["trips"]} for loop in loops],
        "spills": used["VSTORE:SPILL"] + used["VLOAD:FILL"],
        "slots": used,
    }


def _bundles(file: str):
    """(label, loop depth, text) of every bundle."""
    with open(file) as lines:
        for line in lines:
            if found := re.match(r"\s*0x[0-9a-f]+\s+(LH|LB|LE|PB|PF)?\s*:\s*(>*)(.*)", line):
                yield found[1], len(found[2]), found[3]


def _used_slots(file: str) -> dict[str, int]:
    with open(file) as f:
        lines = f.read().splitlines()
    names = [n.strip() for n in lines[1].split(",")]
    rows = [list(map(int, line.split())) for line in lines[4:] if len(line.split()) == len(names)]
    return dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))


def with_marginal(chip: str, segments, columns: int, rows: int, x_dtype: str, target: str | None, fields: dict) -> dict:
    """`compile_one`, and the same of half the input channels where nothing else tells what more of them cost."""
    result = compile_one(chip, segments, columns, rows, x_dtype, target, fields)
    if result["marginal"] is None and not result["loops"] and len(segments) == 1:
        bits, channels, *rest = segments[0]
        half = compile_one(chip, [(bits, channels // 2, *rest)], columns, rows, x_dtype, target, result["config"])
        weights = (channels - channels // 2) * min(result["config"]["columns"], columns)
        result["marginal"] = round((result["step"] - half["step"]) * 1024 / weights, 3)
    return result


def compile_one(chip: str, segments, columns: int, rows: int, x_dtype: str, target: str | None, fields: dict) -> dict:
    """segments: (bits, channels, group or None, asymmetric) each."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from lq_kernels import PackedMatrix
    from lq_kernels.backend import Problem, segment_of
    from lq_kernels.packed import SegmentedMatrix
    from lq_kernels.packing import plane_widths, words_along
    from lq_kernels.prepared import lay_out
    from lq_kernels.tpu import BACKEND
    from lq_kernels.tpu.config import vmem_bytes

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def aval(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def packed(bits, channels, group, asymmetric):
        groups = 1 if group is None else -(-channels // group)
        return PackedMatrix(
            planes=tuple(aval((words_along(channels, p), columns), jnp.uint32) for p in plane_widths(bits)),
            scales=aval((groups, columns), jnp.bfloat16),
            zeros=aval((groups, columns), jnp.uint8) if asymmetric else None,
            zero_point=float(1 << bits - 1),
            bits=bits,
            group_size=channels if group is None else group,
            in_features=channels,
        )

    matrix = SegmentedMatrix(segments=tuple(packed(*s) for s in segments))
    target = target or BACKEND.target(device.device_kind)
    prepared = jax.eval_shape(lambda w: lay_out(w, BACKEND, target), matrix)
    prepared = jax.tree.map(lambda a: aval(a.shape, a.dtype), prepared)
    statics = tuple(segment_of(s) for s in matrix.segments)
    problem = Problem(rows, matrix.in_features, columns, x_dtype, x_dtype, statics, device.device_kind)
    config = BACKEND.default_config(problem, target)
    config = type(config)(**{**vars(config), **fields})
    folder = os.environ["LQ_LLO_DUMP"]
    for old in glob.glob(f"{folder}/*"):
        os.remove(old)

    def product(x, w):
        return BACKEND.matmul(x, w, out_dtype=jnp.dtype(x_dtype), config=config)

    x = aval((rows, matrix.in_features), jnp.dtype(x_dtype))
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        compiled = jax.jit(product).trace(x, prepared).lower(lowering_platforms=("tpu",)).compile()
    counted = schedule(folder)
    terms = {"int8": 1, "digits": 4}.get(config.activations, {"bfloat16": 1, "float16": 2, "float32": 3}[x_dtype])
    steps = -(-columns // config.columns) * -(-terms * rows // min(config.rows, terms * rows))
    again = sum(loop["bundles"] * (loop["trips"] - 1) for loop in counted["loops"] if loop["trips"])
    weights = matrix.in_features * columns
    turn = [loop for loop in counted["loops"] if loop["trips"]]
    one = min(config.unroll, segments[0][1] // 256) * 256 * min(config.columns, columns)
    result = {
        "rows": rows,
        "whole": round((counted["outside"] + steps * (counted["step"] + again)) * 1024 / weights, 3),
        "marginal": round(turn[0]["bundles"] * 1024 / one, 3)
        if turn and not config.keep and rows <= config.rows
        else None,
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "spills": counted["spills"],
        "vmem": vmem_bytes(problem, target, config),
        "config": vars(config),
        "sides": sum(
            2 * a.size * a.dtype.itemsize for s in prepared.arrays for a in (s["scales"], s["zeros"]) if a is not None
        ),
        "loops": counted["loops"],
        "step": counted["step"],
        "slots": counted["slots"],
    }
    if len(segments) == 1:
        bits, _, group, asymmetric = segments[0]
        limit = budget(chip, bits, group, asymmetric)
        result["budget"] = limit and round(limit, 3)
    return result


def parse_segment(text: str):
    """ "4:4096:g128:a" -> (4, 4096, 128, True); "g0" is one group for the whole column; 128 when left out."""
    bits, channels, *rest = text.split(":")
    group = next((int(r[1:]) for r in rest if r.startswith("g")), 128)
    return int(bits), int(channels), group or None, "a" in rest


@contextlib.contextmanager
def dumping():
    """Has libtpu write schedules to a folder, which LQ_LLO_DUMP names. To be entered before JAX is imported."""
    with tempfile.TemporaryDirectory(prefix="llo") as folder:
        os.environ["LIBTPU_INIT_ARGS"] = (
            os.environ.get("LIBTPU_INIT_ARGS", "") + f" --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        os.environ.update(LQ_LLO_DUMP=folder, ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        yield folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, required=True)
    parser.add_argument("--segments", nargs="+", default=["4:4096"], help="bits:channels[:gGROUP][:a], a: asymmetric")
    parser.add_argument("--columns-total", type=int, default=4096, help="output channels")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--x-dtype", default="bfloat16")
    parser.add_argument("--target", help='layout, as "v6e-memory"; the chip\'s own when left out')
    parser.add_argument("--config", default="{}", help="fields of TpuConfig as JSON, over the default")
    parser.add_argument("--marginal", action="store_true", help="compile half the channels too where that takes it")
    args = parser.parse_args()
    one = with_marginal if args.marginal else compile_one
    with dumping():
        segments = [parse_segment(s) for s in args.segments]
        fields = json.loads(args.config)
        common = (args.chip, segments, args.columns_total)
        results = [one(*common, rows, args.x_dtype, args.target, fields) for rows in args.rows]
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
