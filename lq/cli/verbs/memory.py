"""`lq plan-memory`: whether a model fits, before there is a machine."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from lq.cli.options import BitsList, EmbeddingBits, GroupSize, HeadBits, Symmetric
from lq.cli.printing import print_table
from lq.errors import UserError


def plan_memory(
    model: Annotated[str, typer.Argument(help="A directory with config.json, or a hub name.", show_default=False)],
    bpw: Annotated[float | None, typer.Option(help="Bits per weight of the blocks; 16, dense, when not given.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan of this model in place of --bpw.")] = None,
    bits: BitsList = "2,3,4,5,6,8",
    group_size: GroupSize = "128",
    symmetric: Symmetric = False,
    embedding_bits: EmbeddingBits = 16,
    head_bits: HeadBits = 16,
    mesh: Annotated[str | None, typer.Option(help="Devices by axis; all along tensor when not given.")] = None,
    topology: Annotated[str | None, typer.Option(help="v5e:2x4, h200x8: memory, and for TPUs the compiler.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of text.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of a step: 1 decodes, more is a prompt.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the cache has room for; 8192 or the context, if none.")
    ] = None,
    kv_bits: Annotated[int, typer.Option(help="Of the cache: 4, 8 or 16.")] = 16,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the numbers here as well.")] = None,
) -> None:
    """Bytes on every device, from the config alone; with --topology of TPUs and libtpu, compiled for them."""
    from lq.assets import resolve_model
    from lq.cli import arguments
    from lq.models.loading import config_of
    from lq.numerics.spec import QuantSpec
    from lq.parallel import planning
    from lq.parallel.devices import topology as read_topology
    from lq.parallel.memory import Step

    config = config_of(resolve_model(model))
    target = None if topology is None else read_topology(topology)
    if plan is not None and bpw is not None:
        raise UserError("plan-memory: --plan and --bpw are both given; leave one out")
    spec = QuantSpec(bits=8, group_size=arguments.group_sizes(group_size)[0], symmetric=symmetric)
    made = planning.plan_for(config, bpw, plan, arguments.widths(bits), spec, embedding_bits, head_bits)
    room = min(8192, config.max_positions) if length is None else length
    step = Step(batch=batch, tokens=tokens, length=room, kv_bits=kv_bits)
    compiles = target is not None and target.tpu is not None and importlib.util.find_spec("libtpu") is not None
    found = planning.memory(config, made, step, mesh, target, compiles=compiles)
    print_table(["", ""], [[name, value] for name, value in found.lines()])
    if target is not None and target.tpu is not None and not compiles:
        print("temporaries are not counted: install libtpu (pip install 'lq[tpu]') and they are compiled for")
    if json_ is not None:
        from lq.atomic import write_text

        write_text(json_, json.dumps(found.to_dict(), indent=1) + "\n")
