"""The one exception that stands for a mistake in the input rather than in the program, and what it suggests."""

import operator
import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """Something the caller gave is wrong; the message names the value, what was expected and what to do.

    It is a `ValueError`, so library users need not know of it; the command line prints it without a traceback.
    """


class MissingExtraError(InputError, ImportError):
    """What was asked for needs a package that only an extra of this one brings; the message says how to install it."""

    def __init__(self, needs: str, extra: str):
        super().__init__(f"{needs}, which is not installed; install it: {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    """The command that installs what an extra brings: from the clone that this is, else its packages by their names.

    It never asks an index for this package by name: it is not published on any.
    """
    clone = Path(__file__).resolve().parents[2]
    if (clone / "pyproject.toml").exists():
        return f"pip install --editable {shlex.quote(f'{clone}[{extra}]')}"
    from importlib import metadata  # takes a while

    of_extra = re.compile(rf"""extra == ['"]{extra}['"]""")
    lines = (line.partition(";") for line in metadata.requires("fibattn") or ())
    return "pip install " + shlex.join(needed.strip() for needed, _, marker in lines if of_extra.search(marker))


def whole_number(name: str, value: object) -> int:
    """`value`, of Python's or another integer type, as a Python integer.

    Raises:
        InputError: for anything but a whole number of at most 63 bits.
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
