"""The one exception that stands for a mistake in the input rather than in the program."""


class InputError(ValueError):
    """Something the caller gave is wrong; the message names the value, what was expected and what to do.

    It is a `ValueError`, so library users need not know of it; the command line prints it without a traceback.
    """
