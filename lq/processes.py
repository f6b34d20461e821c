"""What several processes that are one run do together: one of them writes, and all know what it found."""

import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from lq.errors import UserError

# What the libraries of collectives say when a process they exchange with is not there any more.
GONE = re.compile(
    "gloo|unavailable|deadline.exceeded|connection (closed|reset|refused)|heartbeat|preempt", re.IGNORECASE
)
GRACE = 2.0  # seconds for which the first process, whose end stops the others, lets them say why they end

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


def another_is_gone(error: BaseException) -> bool:
    """Whether this is what is raised in a process when another of the same run has ended."""
    return (
        several() and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and bool(GONE.search(str(error)))
    )


def leave(status: int) -> NoReturn:
    """Ends this process at once. Python's own way waits for all others, which may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(GRACE)
    os._exit(status)


def _from_first(data: bytes) -> bytes:
    """The bytes that the first process has."""
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    length = int(broadcast_one_to_all(np.int64(len(data) if is_first() else 0)))
    padded = np.zeros(length, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(padded)).tobytes()
