"""`--mesh` and `--distributed`: verbs that run on many devices, of one process or of several."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from lq.errors import UserError

HEARTBEAT = 30  # seconds after which a process that says nothing counts as ended, and the others end too

OPTIONS = {
    "mesh": Annotated[
        str | None,
        typer.Option(
            "--mesh",
            help="Devices by axis: data, fsdp, expert, tensor; such as data=2,tensor=4. One device when not given.",
            show_default=False,
        ),
    ],
    "distributed": Annotated[
        str | None,
        typer.Option(
            "--distributed",
            help="One of several processes: HOST:PORT,NUMBER,COUNT, the first's address; auto on a TPU slice or SLURM.",
            show_default=False,
        ),
    ],
}


def on_mesh(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the options --mesh and --distributed, and runs it there."""

    @functools.wraps(verb)
    def run(*args, mesh: str | None = None, distributed: str | None = None, **kwargs):
        with _in_force(mesh, distributed):
            return verb(*args, **kwargs)

    signature, keyword = inspect.signature(verb), inspect.Parameter.KEYWORD_ONLY
    given = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in OPTIONS.items()]
    # Typer reads options from there; that functions have the attribute, type checkers do not know.
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *given])  # type: ignore[attr]
    run.__annotations__ = {**verb.__annotations__, **OPTIONS}
    return run


@contextlib.contextmanager
def _in_force(mesh: str | None, distributed: str | None) -> Iterator[None]:
    if distributed is not None:
        if mesh is None:
            raise UserError("--distributed: without --mesh every process would compute the same; write --mesh as well")
        _join(distributed)
    if mesh is None:
        yield
        return
    from lq.parallel import make_mesh, use

    with use(make_mesh(mesh)):
        yield


def _join(distributed: str) -> None:
    """Makes this process one of several. Raises UserError for what is no address, number and count."""
    import jax

    if distributed == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        return
    address, *numbers = distributed.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise UserError(f"--distributed {distributed}: write HOST:PORT,NUMBER,COUNT such as host0:8476,0,4, or auto")
    jax.distributed.initialize(address, int(numbers[1]), int(numbers[0]), heartbeat_timeout_seconds=HEARTBEAT)
