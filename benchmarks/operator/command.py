"""`python -m benchmarks operator`: the operator against dense and masked attention, on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError


@dataclass(frozen=True)
class Arguments:
    """Check and time the attention operator and its alternatives: forward, and forward with backward.

    Without --lengths it runs the suite of the device: the cases that the documentation quotes.
    """

    lengths: tuple[int, ...] = ()
    """Lengths in tokens, in place of the suite."""
    shape: Literal["small", "large"] = "small"
    """With --lengths: 8/2 heads of 64, or 32/8 heads of 128."""
    windows: tuple[int, ...] = (12,)
    """With --lengths: windows of the pattern."""
    tokens: int = 1
    """With --lengths: tokens of all sequences together; shorter ones come in batches."""
    providers: tuple[str, ...] = ()
    """Only these; all that can run when left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; the GPU when there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """bfloat16 on a GPU and float32 on a CPU when left out."""
    out: Path = Path("bench")
    """Folder for attention.json, attention.csv and the figure."""
    dry_run: bool = False
    """Only say which providers can run here, and why others cannot."""


def run(arguments: list[str]) -> None:
    """Check, time, print the table, write the files."""
    chosen = parse(Arguments, arguments, "python -m benchmarks operator")
    from rich.console import Console

    from benchmarks.operator import attention, report
    from benchmarks.operator.cases import OURS

    device, cases = _cases(chosen)
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    if chosen.dry_run:
        _print_obstacles(cases, console)
        return
    out = chosen.out / "attention.json"
    result = attention.run(
        cases, device, save=lambda so_far: files.write_json(out, so_far), say=lambda line: print(line, flush=True)
    )
    for line in report.reasons(result):
        console.print(f"not run: {line}", soft_wrap=True)
    console.print(report.table(result))
    figure = report.draw(result, out.with_suffix(".svg"))
    console.print(f"written to {out}, {figure.with_suffix('.csv')} and {figure}", soft_wrap=True)
    if any(row.get("right") is False for row in result["rows"]):
        raise SystemExit("python -m benchmarks operator: a provider gave wrong numbers; see WRONG above")
    if any(row["provider"] in OURS and "failed" in row["not_run"] for row in result["rows"]):
        raise SystemExit("python -m benchmarks operator: this project's operator failed; see 'not run' above")


def _cases(chosen: Arguments):
    from benchmarks.environment import device_of
    from benchmarks.operator.attention import plan
    from benchmarks.operator.cases import SUITES, Grid

    device = device_of(chosen.device)
    if not chosen.lengths and (chosen.shape, chosen.windows, chosen.tokens) != ("small", (12,), 1):
        raise InputError("--shape, --windows and --tokens go with --lengths; say which lengths")
    dtype = ("bfloat16" if device == "cuda" else "float32") if chosen.dtype == "auto" else chosen.dtype
    grids = (Grid(chosen.shape, chosen.windows, chosen.lengths, chosen.tokens),) if chosen.lengths else SUITES[device]
    return device, plan(grids, device, dtype, chosen.providers)


def _print_obstacles(cases, console) -> None:
    from benchmarks.operator.attention import obstacles
    from benchmarks.operator.providers import PROVIDERS

    can: dict[str, dict[str, list[str]]] = {}
    for case, name, why in obstacles(cases):
        forward, both = why["forward"], why["forward_backward"]
        verdict = forward or (f"forward only: {both}" if both else "can run")
        can.setdefault(name, {}).setdefault(verdict, []).append(case.label)
    for name, verdicts in can.items():
        console.print(f"[bold]{name}[/bold]: {PROVIDERS[name].what}")
        for verdict, labels in verdicts.items():
            console.print(f"  {verdict} ({'; '.join(labels)})", soft_wrap=True)
