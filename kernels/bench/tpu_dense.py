"""What the matrix unit of each TPU generation needs for bfloat16 weights: the floor under every unpacking kernel.

    python kernels/bench/tpu_dense.py --record       # writes results/static_cost_tpu_dense.json

A plain Pallas product x [M, 4096] @ w [4096, 4096] in bfloat16, strips of 256 output channels as ours, is compiled as
`tpu_compile.py` does and its bundles are counted: weights pushed into the matrix unit, products popped, nothing else.
"""

import argparse
import glob
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import tpu_compile

RECORD = Path(__file__).parent / "results" / "static_cost_tpu_dense.json"
ROWS = (16, 256, 512, 1024)
CHANNELS, COLUMNS, STRIP = 4096, 4096, 256
SMALL = ("v4",)  # whose VMEM holds no larger block than of 256 rows


def kernel(x_ref, w_ref, o_ref):
    import jax.numpy as jnp

    o_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32).astype(o_ref.dtype)


def bundles(chip: str, rows: int) -> tuple[float, int]:
    """Per 1024 weights, of the whole kernel, and registers spilled. Needs the environment of `tpu_compile.main`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental import topologies
    from jax.experimental.pallas import tpu as pltpu

    from lq_kernels.tpu.config import vmem_limit

    device = topologies.get_topology_desc(platform="tpu", topology_name=tpu_compile.TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((rows, CHANNELS), jnp.bfloat16, sharding=sharding)
    w = jax.ShapeDtypeStruct((CHANNELS, COLUMNS), jnp.bfloat16, sharding=sharding)
    product = pl.pallas_call(
        kernel,
        grid=(COLUMNS // STRIP,),
        in_specs=[
            pl.BlockSpec((rows, CHANNELS), lambda j: (0, 0)),
            pl.BlockSpec((CHANNELS, STRIP), lambda j: (0, j)),
        ],
        out_specs=pl.BlockSpec((rows, STRIP), lambda j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((rows, COLUMNS), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit(chip)),
        name="dense",
    )
    for old in glob.glob(f"{os.environ['LQ_LLO_DUMP']}/*"):
        os.remove(old)
    jax.jit(product).trace(x, w).lower(lowering_platforms=("tpu",)).compile()
    counted = tpu_compile.schedule(os.environ["LQ_LLO_DUMP"], "dense")
    whole = (counted["outside"] + COLUMNS // STRIP * counted["step"]) * 1024 / (CHANNELS * COLUMNS)
    return round(whole, 3), counted["spills"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--chip", choices=tpu_compile.TOPOLOGIES, help="this one, in this process")
    options = parser.parse_args()
    if options.chip:
        with tpu_compile.dumping():
            rows = [m for m in ROWS if m <= 256 or options.chip not in SMALL]
            print(
                json.dumps({m: dict(zip(("bundles", "spills"), bundles(options.chip, m), strict=True)) for m in rows})
            )
        return
    found = {}
    for chip in tpu_compile.TOPOLOGIES:
        done = subprocess.run([sys.executable, __file__, "--chip", chip], capture_output=True, text=True, check=True)
        found[chip] = json.loads(done.stdout.strip().splitlines()[-1])
        print(chip, found[chip])
    if options.record:
        record = {"libtpu": importlib.metadata.version("libtpu"), "per_1024_weights": found}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
