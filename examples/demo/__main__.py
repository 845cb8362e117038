"""`python -m examples.demo`: train a dense and a hybrid model on Python's standard library, and show both."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fibattn.cli.door import guarded
from fibattn.cli.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Train a dense and a hybrid model on Python's standard library and show both past their training length."""

    out: Path = Path("demo")
    """Folder for the data, the models and the report."""
    steps: int = 900
    """Training steps of each model."""


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration and return the exit status, as `fibattn` does."""
    return guarded("demo", _run, arguments, "; the same command goes on where it stopped")


def _run(arguments: Sequence[str]) -> None:
    chosen = parse(Arguments, arguments, "python -m examples.demo")
    from examples.demo.demo import run_demo

    run_demo(chosen.out, steps=chosen.steps)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
