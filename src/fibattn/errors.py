"""The one exception that stands for a mistake in the input rather than in the program, and what it suggests."""

import operator
from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the caller gave is wrong; the message names the value, what was expected and what to do.

    It is a `ValueError`, so library users need not know of it; the command line prints it without a traceback.
    """


def whole_number(name: str, value: object) -> int:
    """`value`, of Python's or another integer type, as a Python integer.

    Raises:
        InputError: for what is no whole number, or has more than 63 bits.
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise InputError(f"{name} is {value!r}; it must be a whole number") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise InputError(f"{name} is {value!r}; it must be a whole number below 2**63")
    return number


def suggestion(name: str, known: Iterable[str], kind: str) -> str:
    """What to do about an unknown name: the one that was meant, most likely, or all there are of its `kind`."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the {kind} are {', '.join(names)}"
