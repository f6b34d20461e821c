"""The static cost of the TPU kernels: every chip and width, compared with what memory allows; recorded as JSON.

    python kernels/bench/tpu_cost.py                 # the recorded table
    python kernels/bench/tpu_cost.py --record        # compile everything (about fifteen minutes) and record it
    python kernels/bench/tpu_cost.py --record --chips v5e --only 4bit

`tpu_compile.py` says what is counted. The record belongs to one version of libtpu, which is written beside it.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE / "results" / "static_cost_tpu.json"
CHIPS = ("v4", "v5e", "v5p", "v6e", "v7x")
ROWS = (1, 16, 256)
PREFILL = (256, 512, 1024)
CHANNELS = COLUMNS = 4096
INTEGER = {"activations": "int8"}


def cases() -> dict[str, dict]:
    """name -> arguments of `measure`: every chip and width in groups of 128, and what else a layer may be."""
    found = {}
    for chip in CHIPS:
        for bits in range(1, 9):
            found[f"{chip} {bits}bit"] = {"chip": chip, "segments": [f"{bits}:{CHANNELS}"], "rows": ROWS}
        if chip != "v4":  # whose VMEM does not hold that many rows: several blocks of them, which are not told apart
            many = {"chip": chip, "rows": PREFILL}
            found[f"{chip} 4bit prefill"] = {**many, "segments": [f"4:{CHANNELS}"]}
            found[f"{chip} 4bit asymmetric prefill"] = {**many, "segments": [f"4:{CHANNELS}:a"]}
        extra = {"chip": chip, "rows": (16,)}
        found[f"{chip} 4bit asymmetric"] = {**extra, "segments": [f"4:{CHANNELS}:a"]}
        found[f"{chip} 4bit groups of 32"] = {**extra, "rows": (1, 16), "segments": [f"4:{CHANNELS}:g32"]}
        found[f"{chip} 2+3+4+8bit"] = {**extra, "segments": [f"{b}:{CHANNELS // 4}" for b in (2, 3, 4, 8)]}
        if chip in ("v5e", "v5p", "v6e"):
            for bits in (2, 3, 4, 8):
                found[f"{chip} {bits}bit int8 activations"] = {
                    **extra,
                    "segments": [f"{bits}:{CHANNELS}"],
                    "config": INTEGER,
                }
        if chip in ("v6e", "v7x"):
            found[f"{chip} 3bit stored in 4"] = {**extra, "segments": [f"3:{CHANNELS}"], "target": f"{chip}-speed"}
    return found


def measure(chip: str, segments, rows, config=None, target=None, marginal=False, timeout: float = 600) -> list[dict]:
    """Compiles in a process of its own. Raises RuntimeError with the end of its stderr when that fails."""
    command = [sys.executable, str(HERE / "tpu_compile.py"), "--chip", chip, "--segments", *segments]
    command += ["--columns-total", str(COLUMNS), "--rows", *map(str, rows), "--config", json.dumps(config or {})]
    command += ["--target", target] if target else []
    command += ["--marginal"] if marginal else []
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nexited with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def libtpu_version() -> str | None:
    for name in ("libtpu", "libtpu-nightly"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def table(costs: dict) -> str:
    lines = [f"{'bundles per 1024 weights':<34}{'rows':>5}{'whole':>8}{'budget':>8}{'ratio':>7}{'spills':>8}"]
    for name, results in costs.items():
        for r in results:
            limit = r.get("budget") if r["rows"] <= 16 else None
            ratio = f"{r['whole'] / limit:.2f}" if limit else "-"
            lines.append(f"{name:<34}{r['rows']:>5}{r['whole']:>8.3f}{limit or '-':>8}{ratio:>7}{r['spills']:>8}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="compile and write the record")
    parser.add_argument("--chips", nargs="+", default=CHIPS)
    parser.add_argument("--only", default="", help="names of cases that contain this")
    args = parser.parse_args()
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {"libtpu": None, "costs": {}}
    costs = recorded["costs"]
    if args.record:
        version = libtpu_version()
        if recorded["libtpu"] != version:
            costs = {}
        for name, case in cases().items():
            if case["chip"] in args.chips and args.only in name:
                costs[name] = measure(**case, marginal=True)
                print(table({name: costs[name]}).partition("\n")[2], flush=True)
                costs = {n: costs[n] for n in cases() if n in costs}
                text = {"libtpu": version, "jax": importlib.metadata.version("jax"), "costs": costs}
                RECORD.parent.mkdir(exist_ok=True)
                RECORD.write_text(json.dumps(text, indent=1) + "\n")
    print(table({n: c for n, c in costs.items() if n.split()[0] in args.chips and args.only in n}))


if __name__ == "__main__":
    main()
