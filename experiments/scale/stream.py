"""Memory and time of quantizing against the number of blocks: a random model of Llama-3-8B's shape, cut short.

    python -m experiments.scale.stream [--blocks 4 8 16] [--out experiments/scale/measured/stream.json]

Numbers of blocks that are in --out already are not measured again. For each of the others a checkpoint of bfloat16
shards is made and deleted again (half a gigabyte a block, and two for embedding and head); in between it is scored
(LIM, ZD), widths are assigned, and it is quantized by rounding to nearest and by GPTQ, each by the command, in a
process whose greatest resident memory the system reports. CPU seconds are those of all its threads, which other work
on the machine changes less than it does wall time.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from experiments.rows import markdown
from lq.assets import ASSETS
from lq.atomic import write_text
from lq.models.families import tensors_of
from lq.models.loading import read_config

HERE = Path(__file__).parent
SHAPE = HERE / "models" / "llama31_8b" / "config.json"
TEXT = ["--samples", "8", "--length", "256"]


def write_checkpoint(directory: Path, shape: dict[str, Any], blocks: int) -> None:
    """A Llama of that shape with so many blocks, normal weights, a shard for every part; the shipped tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": blocks}), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "standin" / file, directory / file)
    rng, where, tensors = np.random.default_rng(0), {}, list(tensors_of(read_config(directory)))
    for part in dict.fromkeys(tensor.part for tensor in tensors):
        mine = {tensor.name: _random(rng, tensor.shape) for tensor in tensors if tensor.part == part}
        safetensors.numpy.save_file(mine, directory / f"{part}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(mine, f"{part}.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, jnp.bfloat16)
    return (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(jnp.bfloat16)


def stages(model: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every command."""
    yield "score", ["score", str(model), "--metric", "lim", "--metric", "zd", "--out", str(out / "scores"), *TEXT]
    allocated = ["--bpw", "3.0", "--bits", "2,3,4", "--method", "greedy", "--out", str(out / "plan.json")]
    yield "allocate", ["allocate", str(out / "scores" / "lim.json"), *allocated]
    for method in ("rtn", "gptq"):
        text = TEXT if method == "gptq" else []
        how = ["--plan", str(out / "plan.json"), "--method", method, "--out", str(out / method), "--quiet", *text]
        yield method, ["quantize", str(model), *how]


def measured(arguments: Sequence[str]) -> dict[str, float]:
    """Seconds, CPU seconds, and gigabytes of resident memory at most, of one command.

    The system counts what a process had before it became another, so this one must stay small.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lq", *arguments], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"stream: lq {arguments[0]} failed with {os.waitstatus_to_exitcode(status)}")
    seconds, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gb": round(_bytes(usage) / 1e9, 3)}


def _apart(function: Callable[..., None], *arguments: Any) -> None:
    """Calls it in a process of its own, whose memory is not this one's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"stream: {function.__name__} failed with {process.exitcode}")


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each stage, a column for each number of blocks."""
    blocks = [case["blocks"] for case in found]
    rows = []
    for stage in found[0]["stages"]:
        peaks = [case["stages"][stage]["peak_gb"] for case in found]
        seconds = [case["stages"][stage]["cpu_seconds"] for case in found]
        rows.append([stage, *(f"{peak:.2f}" for peak in peaks), *(f"{took:.0f}" for took in seconds)])
    return markdown(["stage", *(f"GB, {n} blocks" for n in blocks), *(f"CPU s, {n} blocks" for n in blocks)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--shape", type=Path, default=SHAPE, help="a config.json")
    parser.add_argument("--out", type=Path, default=HERE / "measured" / "stream.json")
    parser.add_argument(
        "--place", type=Path, help="where the checkpoint is made; the system's temporary directory if none"
    )
    arguments = parser.parse_args()
    shape = json.loads(arguments.shape.read_text(encoding="utf-8"))
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else []
    for blocks in sorted(set(arguments.blocks) - {case["blocks"] for case in found}):
        with tempfile.TemporaryDirectory(dir=arguments.place) as directory:
            model, out = Path(directory) / "model", Path(directory)
            _apart(write_checkpoint, model, shape, blocks)
            case: dict[str, Any] = {"blocks": blocks, "stages": {}}
            for name, command in stages(model, out):
                case["stages"][name] = measured(command)
                print(f"{blocks} blocks, {name}: {case['stages'][name]}", flush=True)
        found = sorted([*found, case], key=lambda case: case["blocks"])
        write_text(arguments.out, json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
