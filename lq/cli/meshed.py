"""`--mesh`: verbs that run on many devices at once."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Devices by axis: data, fsdp, expert, tensor; such as data=2,tensor=4. One device when not given.",
        show_default=False,
    ),
]


def on_mesh(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the option --mesh, and runs it there."""

    @functools.wraps(verb)
    def run(*args, mesh: str | None = None, **kwargs):
        with _in_force(mesh):
            return verb(*args, **kwargs)

    signature = inspect.signature(verb)
    option = inspect.Parameter("mesh", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Mesh)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr]
    run.__annotations__ = {**verb.__annotations__, "mesh": Mesh}
    return run


@contextlib.contextmanager
def _in_force(mesh: str | None) -> Iterator[None]:
    if mesh is None:
        yield
        return
    from lq.parallel import make_mesh, use

    with use(make_mesh(mesh)):
        yield
