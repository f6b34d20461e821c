"""What a mistake looks like in the programs here: one line and exit status 2, as in the command."""

import contextlib
import sys
from collections.abc import Iterator

from lq.errors import UserError


@contextlib.contextmanager
def in_one_line(program: str) -> Iterator[None]:
    """Mistakes, and paths that cannot be read or written, end `program` without a traceback."""
    try:
        yield
    except UserError as error:
        problem = " ".join(str(error).split())
    except OSError as error:
        problem = f"{error.filename or error}: {error.strerror or 'cannot be used'}"
    else:
        return
    print(f"{program}: {problem}", file=sys.stderr)
    raise SystemExit(2)
