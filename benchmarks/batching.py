"""`python -m benchmarks batching`: tokens a second of many requests at once, by Transformers' continuous batching."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError

Model = Literal["stagger", "hybrid", "hybrid-unbounded", "dense"]


@dataclass(frozen=True)
class Arguments:
    """Time steps of `generate_batch` in which every request writes a token, on a GPU in bfloat16.

    No prompt is run: requests begin as if so many tokens had gone by.
    """

    contexts: tuple[int, ...] = (1024, 4096, 32_768)
    """Tokens that every request has behind it."""
    requests: int = 64
    """How many there are."""
    models: tuple[Model, ...] = get_args(Model)
    """Which models, as in `decoding`."""
    steps: int = 40
    """Tokens that each writes; the first ten are not timed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; the GPU when there is one."""
    out: Path = Path("bench")
    """Folder for batching.json."""


def run(arguments: list[str]) -> None:
    """Time, print a line for each row, write the file."""
    chosen = parse(Arguments, arguments, "python -m benchmarks batching")
    if min(chosen.contexts, default=0) < 1 or chosen.requests < 1 or chosen.steps < 11 or not chosen.models:
        raise InputError(
            f"contexts {chosen.contexts}, requests {chosen.requests}, steps {chosen.steps}, models {chosen.models}: "
            "there must be a context of at least 1, a request, eleven steps and a model"
        )
    from benchmarks import requests
    from benchmarks.environment import device_of, environment, heading

    device = device_of(chosen.device)
    print(f"{heading()}; no prompt is run", flush=True)
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    for name in chosen.models:
        for context in sorted(set(chosen.contexts)):
            row = requests.throughput(name, context, chosen.requests, chosen.steps, device)
            result["rows"].append(row)
            print(requests.line_of(row), flush=True)
            files.write_json(chosen.out / "batching.json", result)
    print(f"written to {chosen.out / 'batching.json'}")
