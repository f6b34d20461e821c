"""The `lq` command, run in this process."""

from typer.testing import CliRunner

from lq.cli import app


def lq(*args):
    """Exit status, standard output and standard error of a command, run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*args):
    """The one line a mistake is answered with."""
    status, _, error = lq(*args)
    assert status == 2, error
    assert error.startswith("lq: ")
    assert error.count("\n") == 1, error
    return error
