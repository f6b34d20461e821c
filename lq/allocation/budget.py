"""The budget of a plan, in bits, and what can be reached with the widths there are."""

import math

from lq.errors import UserError


def budget_bits(bpw: float | None, nbytes: int | None, total: int) -> int:
    """The bits of a target: so many for each of `total` weights, or bytes. Raises UserError for both, or neither."""
    if nbytes is not None and bpw is None:
        return 8 * nbytes
    if bpw is None or nbytes is not None:
        raise UserError(
            "budget: give bits per weight (--bpw 3.0) or bytes (--bytes 4000000), one of the two; neither only when "
            "there is one width"
        )
    if not (math.isfinite(bpw) and bpw > 0):
        raise UserError(f"budget: {bpw} bits per weight; write a positive number such as 3.0")
    # A target such as 3.1 is not a binary fraction: a plan that meets it exactly must not fail by a rounding error.
    return math.floor(bpw * total + 1e-6)


def in_words(bits, group_sizes, *, pinned: bool) -> str:
    """What there is to choose from, in words."""
    widths = ", ".join(map(str, sorted(set(bits))))
    groups = "" if group_sizes is None else f" in groups of {' or '.join(map(str, group_sizes))}"
    return f"widths {widths}{groups}{' and what is pinned or dense' if pinned else ''}"


def check_reachable(budget: int, low: int, high: int, among: str, total: int, *, in_bytes: bool) -> None:
    """Raises UserError for a budget outside of [low, high], bits all three: it says the range, per `total` weights or
    `in_bytes`, and what there is to choose from (`among`)."""
    if low <= budget <= high:
        return
    if in_bytes:
        wanted, shown = f"{budget // 8} bytes", (f"{-(-low // 8)}", f"{high // 8} bytes")
    else:
        # Rounded inwards, so that either end can be copied into the next command.
        least, most = math.ceil(low / total * 1e4) / 1e4, math.floor(high / total * 1e4) / 1e4
        wanted, shown = f"{budget / total:.4g} bits per weight", (f"{least:.4f}", f"{most:.4f}")
    reach = (
        f"reach {shown[0]} to {shown[1]}" if low < high else f"make exactly {high / total:.6f}; leave the budget out"
    )
    raise UserError(f"budget: {wanted} cannot be met; {among} (scales and zero points included) {reach}")
