"""The one exception class that means: the input was wrong, and here is what to write instead."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: what was wrong, where, what to write instead.

    The command line prints that line and exits with status 2; any other exception is a defect of lq and keeps its
    traceback.
    """
