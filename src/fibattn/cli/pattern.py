"""`fibattn pattern`: which distances every layer attends to, and what the stack of layers reaches."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError, MissingExtraError
from fibattn.pattern import Base, Pattern, Schedule, compose, layer_alphas, layer_patterns, union_coverage

_FARTHEST, _DEEPEST = 200_000, 1_000  # take seconds


@dataclass(frozen=True)
class Arguments:
    """Show which distances every layer attends to and which ones the layers reach together; --out draws both."""

    base: Base = "fibonacci"
    """The sequence of the rungs."""
    schedule: Schedule = "linear"
    """How the rungs' scale alpha changes over depth; a learned one is shown at its start."""
    window: int = 12
    """Distances 0 … WINDOW are always attended to."""
    rungs: int = 15
    """Fibonacci rungs before scaling."""
    layers: int = 16
    """Layers of the stack."""
    max_offset: int | None = None
    """Rungs farther than this after scaling are dropped."""
    context: int = 1024
    """Coverage is counted inside this many tokens; a power-of-two base goes up to CONTEXT - 1."""
    farthest: int | None = None
    """The farthest distance to ask about; the sum of all layers' reaches when left out."""
    out: Path | None = None
    """Draw a figure there, such as pattern.svg; a PNG and a CSV go beside it."""


def run(arguments: list[str]) -> None:
    """Print the table and the summary, and write the figure where one is asked for."""
    chosen = parse(Arguments, arguments, "fibattn pattern")
    if chosen.out is not None and chosen.out.suffix != ".svg":
        raise InputError(f"--out is {chosen.out}; expected a name that ends in .svg, a .png and a .csv go beside it")
    if chosen.out is not None and find_spec("matplotlib") is None:
        raise MissingExtraError("--out draws with matplotlib", "plots")
    if chosen.context < 2:
        raise InputError(f"context is {chosen.context}; it must be at least 2 tokens")
    if chosen.layers > _DEEPEST:
        raise InputError(f"layers is {chosen.layers:,}; at most {_DEEPEST:,} are shown")
    patterns = layer_patterns(
        chosen.base,
        chosen.schedule,
        layers=chosen.layers,
        window=chosen.window,
        rungs=chosen.rungs,
        reach=chosen.context - 1,
        max_offset=chosen.max_offset,
    )
    if chosen.out is not None:
        files.check_writable(chosen.out)
    farthest = sum(pattern.reach for pattern in patterns) if chosen.farthest is None else chosen.farthest
    if farthest > _FARTHEST:
        raise InputError(f"distances up to {farthest:,} are too many; ask with --farthest for at most {_FARTHEST:,}")
    needed = compose([[pattern] for pattern in patterns], farthest)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(_table(layer_alphas(chosen.schedule, layers=chosen.layers), patterns, chosen.context))
    for line in _summary(patterns, needed, chosen.context):
        console.print(line, soft_wrap=True, highlight=False)
    if chosen.out is not None:
        from fibattn.cli.pattern_figure import draw_patterns  # matplotlib takes a while to import

        console.print(f"drawn in {draw_patterns(patterns, needed, chosen.context, chosen.out)}", soft_wrap=True)


def _table(alphas: Sequence[float], patterns: Sequence[Pattern], context: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "alpha", "keys", "reach", "new", "union"):
        table.add_column(heading, justify="right")
    table.add_column("offsets beyond the window")
    covered = 0
    for layer, (alpha, pattern) in enumerate(zip(alphas, patterns, strict=True)):
        before, covered = covered, union_coverage(patterns[: layer + 1], context)
        numbers = (layer, f"{alpha:.3f}", len(pattern.distances), f"{pattern.reach:,}", covered - before, covered)
        table.add_row(*map(str, numbers), " ".join(map(str, pattern.offsets)))
    return table


def _summary(patterns: Sequence[Pattern], needed: Sequence[int | None], context: int) -> list[str]:
    union = union_coverage(patterns, context)
    window = min(max(pattern.window for pattern in patterns) + 1, context)
    keys = sum(len(pattern.distances) for pattern in patterns) / len(patterns)
    inside = needed[:context]
    lines = [
        f"keys a query: {keys:.1f} on average; new, union: distances below {context:,} that this layer adds, so far",
        f"union coverage: {union} of the {context:,} distances ({union - window} beyond the window of {window} keys)",
    ]
    if None not in needed:
        lines.append(f"together: every distance up to {len(needed) - 1:,} is reached")
    else:
        reached = sum(n is not None for n in needed)
        lines.append(
            f"together: {reached:,} of the distances up to {len(needed) - 1:,} are reached; "
            f"the first that no path reaches is {needed.index(None):,}"
        )
    if None not in inside:
        most = max(n for n in inside if n is not None)
        lines.append(f"a value is carried over any distance below {min(context, len(needed)):,} by {most} layers")
    return lines
