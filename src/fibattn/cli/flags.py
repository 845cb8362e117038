"""Flags of a verb: tyro over a dataclass, in one style for all verbs."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from fibattn.cli.door import is_first_process, let_the_first_speak

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], program: str, **options: Any) -> T:
    """The dataclass `kind` filled from the command line; prints help and exits on `--help` or a wrong flag.

    A flag of several values may be given more than once, and all its values count; of a flag with one value the last.
    """
    with nullcontext() if is_first_process() else _silence():
        return tyro.cli(kind, args=_joined(arguments, set(_of_several(kind))), prog=program, **options)


@contextmanager
def _silence() -> Iterator[None]:
    """Say nothing; and the first of several processes has time to say what is wrong, or to show the help."""
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except SystemExit as end:
        if end.code:
            let_the_first_speak()
        raise


def _of_several(kind: type, prefix: str = "--") -> Iterator[str]:
    """The flags that take several values, those of a part by their dotted names."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        while get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        flag = prefix + name.replace("_", "-")
        if is_dataclass(hint):
            yield from _of_several(hint, f"{flag}.")  # pyright: ignore[reportArgumentType]
        if any(get_origin(one) in (tuple, list, dict) for one in (hint, *get_args(hint))):
            yield flag


def _joined(words: Sequence[str], of_several: set[str]) -> list[str]:
    """The same words, the values of each flag that is there more than once behind a single mention of it."""
    end = words.index("--") if "--" in words else len(words)
    flags = [word.partition("=")[0].replace("_", "-") for word in words[:end]]
    values: dict[str, list[str]] = {flag: [] for flag in flags if flag in of_several and flags.count(flag) > 1}
    kept: list[str] = []
    current = kept
    for word, flag in zip(words, flags, strict=False):
        _, equals, value = word.partition("=")
        if flag in values:
            values[flag] += [value] if equals else []
            current = kept if equals else values[flag]
            continue
        current = kept if word.startswith("--") else current
        current.append(word)
    joined = (word for flag, found in values.items() for word in (flag, *found))
    return [*kept, *joined, *words[end:]]
