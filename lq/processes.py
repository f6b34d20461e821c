"""What several processes that are one run do together: one of them writes, and all know what it found."""

import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from lq.errors import UserError

Found = TypeVar("Found")


def several() -> bool:
    """Whether this process is one of several. Imports nothing: without JAX there is one."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return not several() or sys.modules["jax"].process_index() == 0


def agreed(function: Callable[[], Found]) -> Found:
    """What `function` gives in the first process, in all of them; the others wait. What it raises is raised in all."""
    if not several():
        return function()
    answer: tuple[Any, UserError | OSError | None] = (None, None)
    if is_first():
        try:
            answer = (function(), None)
        except (UserError, OSError) as error:
            answer = (None, error)
    found, refused = pickle.loads(_from_first(pickle.dumps(answer)))
    if refused is not None:
        raise refused
    return found


def _from_first(data: bytes) -> bytes:
    """The bytes that the first process has."""
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    length = int(broadcast_one_to_all(np.int64(len(data) if is_first() else 0)))
    padded = np.zeros(length, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(padded)).tobytes()
