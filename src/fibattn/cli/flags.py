"""Flags of a verb: tyro over a dataclass, in one style for all verbs."""

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], program: str, default: T | None = None, **options: Any) -> T:
    """The dataclass `kind` filled from the command line; prints help and exits on `--help` or a wrong flag."""
    if default is not None:
        options["default"] = default
    return tyro.cli(kind, args=list(arguments), prog=program, **options)
