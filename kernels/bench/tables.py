"""The tables of kernels/README.md, from the recorded results beside this file.

python kernels/bench/tables.py            # writes them into the README, between its markers
python kernels/bench/tables.py --check    # exit status 1 when the README says something else
"""

import argparse
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- {}: written by bench/tables.py -->", "<!-- end of {} -->"
CHIPS = ("v4", "v5e", "v5p", "v6e", "v7x")
# Issue slots of an H200's 132 multiprocessors (1.755 GHz, 128 lanes) while its memory (4.3 TB/s) brings one byte.
SLOTS_PER_BYTE = 128 * 132 * 1.755e9 / 4.3e12


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tpu(rows: int) -> str:
    """Bundles per 1024 weights of the whole kernel, and over what the memory's rate allows."""
    costs = read("static_cost_tpu.json")["costs"]
    lines = []
    for bits in range(1, 9):
        cells = [next(r for r in costs[f"{chip} {bits}bit"] if r["rows"] == rows) for chip in CHIPS]
        over = [f" ({c['whole'] / c['budget']:.2f})" if c["budget"] else "" for c in cells]
        lines.append([f"W{bits}", *[f"{c['whole']:.2f}{o}" for c, o in zip(cells, over, strict=True)]])
    if rows == 16:
        dense = read("static_cost_tpu_dense.json")["per_1024_weights"]
        lines.append(["bfloat16, dense", *[f"{dense[chip]['16']['bundles']:.2f}" for chip in CHIPS]])
    return markdown(["", *CHIPS], lines)


def tpu_prefill() -> str:
    """Bundles per 1024 weights, and registers spilled, at many rows; dense products of bfloat16 below."""
    costs, dense = read("static_cost_tpu.json")["costs"], read("static_cost_tpu_dense.json")["per_1024_weights"]
    lines = []

    def line(name: str, found: list[dict | None]) -> None:
        cells = [f"{c.get('whole', c.get('bundles')):.2f} ({c['spills']})" if c else "" for c in found]
        lines.append([name, *cells])

    def at(rows: int, chip: str, case: str) -> dict | None:
        return next((r for r in costs.get(f"{chip} {case}", []) if r["rows"] == rows), None)

    for bits in range(1, 9):
        line(f"256, W{bits}", [at(256, chip, f"{bits}bit") for chip in CHIPS])
    for rows in (256, 512, 1024):
        if rows > 256:
            line(f"{rows}, W4", [at(rows, chip, "4bit prefill") for chip in CHIPS])
        line(f"{rows}, W4 asymmetric", [at(rows, chip, "4bit asymmetric prefill") for chip in CHIPS])
        line(f"{rows}, bfloat16, dense", [dense[chip].get(str(rows)) for chip in CHIPS])
    return markdown(["rows", *CHIPS], lines)


def tpu_special() -> str:
    """What else was compiled at 16 rows: one line a case, one column a chip."""
    costs = read("static_cost_tpu.json")["costs"]
    plain = {f"{bits}bit" for bits in range(1, 9)}
    names = dict.fromkeys(name.partition(" ")[2] for name in costs)
    lines = []
    for name in (n for n in names if n not in plain and "prefill" not in n):
        cells = []
        for chip in CHIPS:
            found = [r for r in costs.get(f"{chip} {name}", []) if r["rows"] == 16]
            cells.append(f"{found[0]['whole']:.2f}" if found else "")
        lines.append([name, *cells])
    return markdown(["16 rows", *CHIPS], lines)


def gpu() -> str:
    """Instructions per weight in the main loop, registers a thread, and the issue slots the memory's rate leaves."""
    costs = read("static_cost_gpu.json")
    lines = []
    for bits in range(1, 9):
        found = [costs[f"w{bits}g128 {rows}x8192x8192"] for rows in (1, 16, 64, 256)]
        slots = SLOTS_PER_BYTE * (bits + 16 / 128) / 8
        cells = [f"{case['loops'][0]['per_weight']:.2f}" for case in found]
        registers = "/".join(str(case["registers"]) for case in found)
        lines.append([f"W{bits}", *cells, f"{slots:.2f}", registers])
    header = ["", "1 row", "16", "64", "256", "slots", "registers"]
    return markdown(header, lines)


def cpu(name: str) -> str:
    """Milliseconds (fastest of the run) for 4096 x 4096; for one row, the share of the most that one core brought.

    That is what the plain reader got or, on a machine where it got less than a product, what the best product did.
    """
    bits = (8, 4, 3, 2)
    best: dict = {}
    share: dict = {}
    for run in read(name)["runs"]:
        alone = [r for r in run["results"] if r["contender"].startswith("cpu ") and "," not in r["contender"]]
        most = max(run["read_gb_per_s"], *(r["gb_per_s"] for r in alone))
        for r in run["results"]:
            key = (r["M"], r["x"], r["contender"])
            if r["min_ms"] < best.get(key, float("inf")):
                best[key], share[key] = r["min_ms"], r["gb_per_s"] / most
    suffixes = sorted({c.partition(" bits")[2] for _, _, c in best if c.startswith("cpu ")})
    packed = [f"cpu {b} bits{suffix}" for suffix in suffixes for b in bits]
    columns = ["XLA dot float32", "XLA dot bfloat16", "xla_scan 4 bits", *packed]
    titles = [c.replace("cpu ", "").replace(", threads=0", ", all cores") for c in columns]
    lines = []
    for rows in sorted({m for m, _, _ in best}):
        for x in ("float32", "bfloat16"):
            keys = [(rows, x if not c.startswith("XLA") else c.split()[-1], c) for c in columns]
            lines.append([str(rows), x, *[f"{best[k]:.2f}" if k in best else "" for k in keys]])
            if rows == 1:
                of_read = [f"{share[k]:.0%}" if k in share and k[2] in packed[: len(bits)] else "" for k in keys]
                lines.append(["", "of the most a core brought", *of_read])
    return markdown(["rows", "x", *titles], lines)


TABLES = {
    "tpu, 1 row": lambda: tpu(1),
    "tpu, 16 rows": lambda: tpu(16),
    "tpu, many rows": tpu_prefill,
    "tpu, special": tpu_special,
    "gpu": gpu,
    "cpu, Sapphire Rapids": lambda: cpu("cpu_sapphire_rapids_4096.json"),
    "cpu, Zen 4": lambda: cpu("cpu_zen4_4096.json"),
}


def rendered(text: str) -> str:
    """The README with every table as the records have it."""
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{README}: no place for the table {name!r}; write {begin} and {end}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    if options.check:
        return 0 if rendered(text) == text else 1
    README.write_text(rendered(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
