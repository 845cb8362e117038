"""`python -m benchmarks sharding`: training steps of one GPU against those of several, weights copied or sharded."""

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError, suggestion

Way = Literal["alone", "ddp", "fsdp"]


@dataclass(frozen=True)
class Arguments:
    """Time training steps of a recipe alone on one GPU, then over several, each in processes of its own.

    Every process has the same tokens in a step, so tokens a second and GPU should stay what they are alone.
    """

    model: str = "hybrid-1b"
    """A preset for a GPU."""
    processes: tuple[int, ...] = ()
    """Over how many GPUs; all there are when left out. One is of use, too: it shows what sharding costs by itself."""
    ways: tuple[Way, ...] = ("alone", "fsdp")
    """What is timed: without torchrun, weights copied (DDP), sharded (FSDP2)."""
    checkpointing: tuple[bool, ...] = (False, True)
    """Whether activations are computed again."""
    micro_batch: int | None = None
    """Sequences of a forward pass; the recipe's own when left out."""
    tokens: int = 32_768
    """Tokens of a process in a step."""
    timed: int = 20
    """Steps to time, a multiple of ten."""
    kernels: int = 0
    """How many single kernels to name."""
    out: Path = Path("bench/sharding.json")
    """Where the JSON goes."""


def run(arguments: list[str]) -> None:
    """Time each way, print a line for it, write the JSON."""
    chosen = parse(Arguments, arguments, "python -m benchmarks sharding")
    import torch

    from benchmarks.environment import environment, heading
    from benchmarks.steps import RECIPES

    if chosen.model not in RECIPES:
        raise InputError(f"there is no model {chosen.model!r}: {suggestion(chosen.model, RECIPES, 'models')}")
    if chosen.timed < 10 or chosen.timed % 10:
        raise InputError(f"timed is {chosen.timed}; expected a multiple of 10")
    counts = chosen.processes or (torch.cuda.device_count(),)
    if not torch.cuda.is_available() or max(counts) > torch.cuda.device_count():
        raise InputError(f"{max(counts)} GPUs were asked for, and PyTorch finds {torch.cuda.device_count()} here")
    print(heading(), flush=True)
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    for checkpointing, way in itertools.product(chosen.checkpointing, chosen.ways):
        for count in (1,) if way == "alone" else counts:
            row = _row(chosen, way, count, checkpointing)
            result["rows"].append(row)
            files.write_json(chosen.out, result)
            print(_line(row, result["rows"]), flush=True)
    print(f"written to {chosen.out}")


def _row(chosen: Arguments, way: Way, count: int, checkpointing: bool) -> dict[str, Any]:
    """One measurement, in processes of its own, which say themselves why one fails."""
    case = {"way": way, "processes": count, "checkpointing": checkpointing}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words = json.dumps({**asdict(chosen), **case, "out": str(out)}, default=str)
        command = [sys.executable, *([] if way == "alone" else launcher), "-m", "benchmarks.sharding_worker", words]
        done = subprocess.run(command, check=False)
        return case | (files.read_json(out) if out.exists() else {"error": f"it ended with {done.returncode}"})


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What is printed of a row, beside the one alone."""
    where = f"{row['way']} on {row['processes']}{', checkpointing' if row['checkpointing'] else ''}"
    if "error" in row:
        return f"{where}: {row['error']}"
    alike = [one for one in rows if one["way"] == "alone" and one["checkpointing"] == row["checkpointing"]]
    part = f", {row['speed'] / alike[0]['speed']:.1%} of alone" if alike and "speed" in alike[0] else ""
    groups = ", ".join(f"{group} {milliseconds:.1f}" for group, milliseconds in row["groups"].items())
    kernels = "".join(f"\n    {milliseconds:8.2f}  {name[:100]}" for name, milliseconds in row["kernels"])
    return (
        f"{where}: {row['ms']:.1f} ms a step, {row['speed'] / 1e3:.1f} k tokens/s a GPU{part}, {row['peak']:.1f} GiB, "
        f"{row['seconds']:.0f} s in all ({groups}){kernels}"
    )
