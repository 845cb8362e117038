"""The one exception that stands for a mistake in the input rather than in the program, and what it suggests."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the caller gave is wrong; the message names the value, what was expected and what to do.

    It is a `ValueError`, so library users need not know of it; the command line prints it without a traceback.
    """


def suggestion(name: str, known: Iterable[str], kind: str) -> str:
    """What to do about an unknown name: the one that was meant, most likely, or all there are of its `kind`."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the {kind} are {', '.join(names)}"
