"""Tables, cells and plans for the terminal."""

import shutil
import sys


def cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns, two blanks apart."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows] if any(header) else rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def describe_plan(plan) -> None:
    from lq.runs.weighed import COUNTED

    print(f"{plan.bpw:.4f} bits per weight, {plan.code_bits:.4f} code bits, over {COUNTED[plan.count]}")
    print(f"{plan.nbytes} bytes for the whole model")
    print("bits per block: " + " ".join(f"{b:g}" for b in plan.bits_per_block()))
    for pattern in plan.provenance.get("unused_pins", []):
        print(f"pin {pattern!r} matches no matrix", file=sys.stderr)
    for pattern in plan.provenance.get("shadowed_pins", []):
        print(f"pin {pattern!r} matches only matrices that an earlier pin decides", file=sys.stderr)
