"""The `lq` command. `app` holds the application, `verbs` what it can do; heavy imports wait until a verb runs."""

from lq.cli import verbs  # noqa: F401  registers them
from lq.cli.app import app, main

__all__ = ["app", "main"]
