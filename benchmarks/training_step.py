"""`python -m benchmarks training-step`: what a step of the project's trainer takes, and where its time goes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibattn import files
from fibattn.cli.flags import parse
from fibattn.errors import InputError, suggestion


@dataclass(frozen=True)
class Arguments:
    """Time training steps of whole recipes under the project's own trainer, on an NVIDIA GPU.

    bf16 autocast, compiled. The tokens are random.
    """

    models: tuple[str, ...] = ("hybrid", "dense", "stagger", "learned")
    """Presets for a GPU, `stagger` or `learned`, or runs of the study `beyond` in the paper's recipe."""
    sequence_length: int | None = None
    """Tokens of a training sequence, the recipe's own when left out; a step keeps its tokens, or has one sequence."""
    vocab_size: int = 32_768
    """Ids of the vocabulary; `five-minutes` is meant for 8,192."""
    timed: int = 40
    """Steps to time, a multiple of ten."""
    kernels: int = 0
    """How many single kernels to name."""
    out: Path = Path("bench/training-step.json")
    """Where the JSON goes."""


def run(arguments: list[str]) -> None:
    """Time, print a line for each model, write the JSON."""
    chosen = parse(Arguments, arguments, "python -m benchmarks training-step")
    if chosen.timed < 10 or chosen.timed % 10 or (chosen.sequence_length or 1) < 1:
        raise InputError(
            f"timed is {chosen.timed}, sequence_length {chosen.sequence_length}; "
            "expected a multiple of 10, and at least 1"
        )
    if not 3 <= chosen.vocab_size <= 2**16:
        raise InputError(f"vocab_size is {chosen.vocab_size}; expected 3 to 65,536")
    import torch

    from benchmarks.environment import environment, heading, need_gpu
    from benchmarks.steps import RECIPES, clocked, group_of, row_of, shortened

    for name in chosen.models:
        if name not in RECIPES:
            raise InputError(f"there is no model {name!r}: {suggestion(name, RECIPES, 'models')}")
    need_gpu()
    print(heading(), flush=True)
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    for name in chosen.models:
        recipe = shortened(RECIPES[name], chosen.sequence_length, chosen.timed)
        with tempfile.TemporaryDirectory() as folder:
            torch.cuda.reset_peak_memory_stats()
            clock = clocked(recipe, Path(folder), chosen.vocab_size)
        row = {
            "model": name,
            "sequence_length": recipe.sequence_length,
            "vocab_size": chosen.vocab_size,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            **row_of(clock, recipe.sequences_per_step * recipe.sequence_length),
        }
        result["rows"].append(row)
        files.write_json(chosen.out, result)
        parts = ", ".join(f"{group} {milliseconds:.1f}" for group, milliseconds in row["groups"].items())
        print(
            f"{name}: {row['ms']:.1f} ms a step, {row['tokens_per_second'] / 1e3:,.0f} k tokens/s, "
            f"{row['peak_memory_gib']:.0f} GiB ({parts})",
            flush=True,
        )
        for kernel, milliseconds in clock.kernels.most_common(chosen.kernels):
            print(f"    {milliseconds:7.2f}  {group_of(kernel):<24} {kernel[:100]}", flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    print(f"written to {chosen.out}")
