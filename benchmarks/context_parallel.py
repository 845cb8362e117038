"""`torchrun --nproc-per-node N -m benchmarks context-parallel`: rows cut over GPUs, checked and timed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError

Part = Literal["check", "bytes", "scaling"]


@dataclass(frozen=True)
class Arguments:
    """Cut rows over the processes of torchrun; bf16 autocast on GPUs. Each process also does a whole row alone.

    check: the gradients of a cut row and of a whole one, against float32. bytes: what a layer sends, counted, and how
    long it takes. scaling: a training step with so many tokens a process, alone and cut.
    """

    parts: tuple[Part, ...] = ("check", "bytes", "scaling")
    """What to do."""
    size: Literal["60m", "1b"] = "60m"
    """The default recipe, its full layers bounded; or that with 24 layers of 2,048 and heads of 128, 1.15 billion."""
    dense: bool = False
    """Time full, unbounded attention in every layer instead."""
    full_reach: int = 1023
    """How far back full layers look."""
    check_tokens: int = 16_384
    """Tokens of a row that is checked, of a model with eight layers."""
    lengths: tuple[int, ...] = (65_536, 262_144, 1_048_576)
    """Tokens of the rows of which bytes are counted."""
    tokens: int = 131_072
    """Tokens of a process in a training step that is timed."""
    steps: int = 8
    """Steps to time."""
    alone: bool = True
    """Time a whole row in each process, too; off where it would not fit."""
    compile: bool = True
    """Compile the model that is timed, and one that is checked."""
    checkpointing: bool = False
    """Compute activations again in the backward pass."""
    out: Path = Path("bench/context-parallel.json")
    """Where the JSON goes."""


def run(arguments: list[str]) -> None:
    """Check, count and time; the first process prints a line for each and writes the JSON."""
    chosen = parse(Arguments, arguments, "torchrun … -m benchmarks context-parallel")
    import torch
    import torch.distributed as dist

    from benchmarks.cut_rows import check, count, say, scale
    from benchmarks.environment import environment, heading

    if not dist.is_torchelastic_launched():
        raise InputError("this needs several processes: torchrun --nproc-per-node 2 -m benchmarks context-parallel")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=own)
    say(f"{heading()}, {dist.get_world_size()} processes")
    result: dict[str, Any] = {"environment": environment(), "processes": dist.get_world_size()}
    result |= {"size": chosen.size, "dense": chosen.dense}
    for part in chosen.parts:
        result[part] = {"check": check, "bytes": count, "scaling": scale}[part](chosen)
        if dist.get_rank() == 0:
            files.write_json(chosen.out, result)
    dist.destroy_process_group()
    if not all(row["right"] for row in result.get("check", ())):
        raise SystemExit(1)
