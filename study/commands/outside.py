"""`python -m study outside CODE`: somebody else's program on the study's text, as a baseline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fibattn import files
from fibattn.cli.flags import parse


@dataclass(frozen=True)
class Arguments:
    """Train karpathy/autoresearch's model on the study's text, and write its bits per byte. Needs an NVIDIA GPU."""

    code: Annotated[Path, tyro.conf.Positional]
    """A checkout of it, with its train.py."""
    data: Path
    """The text: `fibattn prepare … --vocab-size 8192`."""
    like: Path
    """The same text as the study's models have it."""
    seconds: float = 300.0
    """How long to train; compilation and evaluation come on top."""
    eval_tokens: int = 524_288
    """Evaluated are the bytes of so many of LIKE's tokens of each held-out set."""
    out: Path = Path("study/results/outside/autoresearch.json")
    """Where the result goes."""


def run(arguments: list[str]) -> None:
    """Run it, and print what came of it."""
    chosen = parse(Arguments, arguments, "python -m study outside")
    files.check_writable(chosen.out)
    from study.outside.autoresearch import run_outside

    found = run_outside(chosen.code, chosen.data, chosen.like, seconds=chosen.seconds, targets=chosen.eval_tokens)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(chosen.out, found)
    print(json.dumps(found, indent=1))
