"""Whether Llama 3.1 fits: bytes on every device, and compiled ahead of time where these are TPUs. Reads no weights.

    python -m experiments.scale.plan [--out experiments/scale/measured/plan.json]

Takes libtpu (pip install 'lq[tpu]'), which needs no TPU. Every case is a process of its own, since the compiler may end
the one it runs in. A step decodes one token with 8192 in the cache, of one row of text.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.rows import markdown
from lq.atomic import write_text

MODELS = ("llama31_8b", "llama31_70b", "llama31_405b")
SIZES = (2.5, 3.25, 4.25)
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1", "h200", "h200x8")
HERE = Path(__file__).parent


def planned(model: str, bpw: float, topology: str) -> dict:
    """What `lq plan-memory` finds."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "found.json"
        how = ["--bpw", str(bpw), "--topology", topology, "--json", str(file)]
        command = [sys.executable, "-m", "lq", "plan-memory", str(HERE / "models" / model), *how]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"plan: {model}, {bpw}, {topology}: {done.stderr.strip().splitlines()[-1]}")
        return {"model": model, "topology": topology} | json.loads(file.read_text(encoding="utf-8"))


def table(found: list[dict]) -> str:
    """Markdown: GiB a device; where that is too much, how many devices or bits would do."""
    rows = []
    for model in dict.fromkeys(case["model"] for case in found):
        for bpw in SIZES:
            cells = [_cell(case) for case in found if case["model"] == model and abs(case["bpw"] - bpw) < 0.05]
            rows.append([model, f"{bpw:g}", *cells])
    return markdown(["model", "bits per weight", *TOPOLOGIES], rows)


def _cell(case: dict) -> str:
    total = f"{case['total'] / 2**30:.3g}"
    if case["fits"]:
        return total
    devices = case["fitting_devices"]
    return f"**{total}**, tensor={devices}" if devices else f"**{total}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "measured" / "plan.json")
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("plan: libtpu is not installed, and TPUs are compiled for; pip install 'lq[tpu]'")
    found = []
    for model in MODELS:
        for bpw in SIZES:
            for topology in TOPOLOGIES:
                found.append(planned(model, bpw, topology))
                print(f"{model}, {bpw} bits, {topology}: {_cell(found[-1])} GiB", flush=True)
    write_text(arguments.out, json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
