"""What a search may choose from: widths of the one format that the block matrices of a plan have."""

import dataclasses
from collections.abc import Sequence

from lq.allocation.plan import Plan
from lq.errors import UserError
from lq.models.matrices import block_of
from lq.numerics.spec import QuantSpec


def of_blocks(plan: Plan) -> dict[str, QuantSpec]:
    """All that a search looks at: embedding and head are dense in every model that it judges."""
    return {path: spec for path, spec in plan.specs.items() if block_of(path) is not None}


def format_of(plan: Plan, bits: Sequence[int], **apart: object) -> QuantSpec:
    """That of the plan's block matrices, in 8 bits.

    Args:
      plan: where a search begins.
      bits: widths to choose from.
      apart: fields in which its matrices may differ, and what the format has there.

    Raises:
      UserError: a plan of several formats or none, of segments unless `apart` has widths; widths that it has and `bits`
        has not.
    """
    given = of_blocks(plan).values()
    if "widths" not in apart and any(spec.widths is not None for spec in given):
        raise UserError(
            "plan: matrices of segments, where whole ones are exchanged; write method descent with a number of "
            "segment_channels, or give a plan of whole matrices"
        )
    fields: dict = {"bits": 8, **apart}
    same = {dataclasses.replace(spec, **fields) for spec in given}
    if not same:
        raise UserError("plan: no matrix of a block is quantized, and there is nothing to choose; quantize some")
    if len(same) != 1:
        raise UserError(f"plan: block matrices of {len(same)} formats, where a search takes one; make it with one")
    if missing := sorted({spec.bits for spec in given} - set(bits)):
        raise UserError(f"bits: {', '.join(map(str, bits))}, but the plan has {missing[0]}; add it")
    (found,) = same
    return found
