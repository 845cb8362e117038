"""`python -m benchmarks paged-decode`: the kernel for pages against the ring's, at a mix of lengths."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError


@dataclass(frozen=True)
class Arguments:
    """Time one token of every request, from pages and from rings, and a chunk of prompts from pages.

    Requests have any length up to the longest; their pages lie anywhere, as an engine's do after a while.
    """

    requests: int = 64
    """How many there are."""
    longest: int = 32_768
    """The most tokens that one has."""
    page: int = 16
    """Tokens of a page."""
    chunk: int = 2048
    """New tokens of the chunk that is timed, of four requests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; the GPU when there is one."""
    out: Path = Path("bench")
    """Folder for paged-decode.json."""


def run(arguments: list[str]) -> None:
    """Time, print a line for each pattern, write the file."""
    chosen = parse(Arguments, arguments, "python -m benchmarks paged-decode")
    if min(chosen.requests, chosen.longest, chosen.page, chosen.chunk // 4) < 1:
        raise InputError("there must be a request, a token, a row in a page and four tokens in a chunk")
    from benchmarks import pages
    from benchmarks.environment import device_of, environment, heading

    device = device_of(chosen.device)
    print(heading(), flush=True)
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    for row in pages.rows(chosen.requests, chosen.longest, chosen.page, chosen.chunk, device):
        result["rows"].append(row)
        print(pages.line_of(row), flush=True)
        files.write_json(chosen.out / "paged-decode.json", result)
    print(f"written to {chosen.out / 'paged-decode.json'}")
