"""`python -m lq` is the `lq` command."""

from lq.cli import main

main()
