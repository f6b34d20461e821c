"""Tables and cells for the terminal."""

import shutil


def cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def terminal_width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Left-aligned columns, two blanks apart."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows] if any(header) else rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
