"""The process that `python -m benchmarks sharding` starts on each GPU: one measurement, whose row the first writes."""

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.steps import RECIPES, clocked, row_of, shortened
from fibattn import files
from fibattn.cli.door import is_first_process
from fibattn.training.trainer import process_count


def main() -> None:
    """Train a little, and write down what a step takes."""
    began = time.monotonic()
    case = json.loads(sys.argv[1])
    recipe = RECIPES[case["model"]]
    share = max(case["tokens"] // recipe.sequence_length, 1)
    recipe = replace(
        shortened(recipe, None, case["timed"]),
        micro_batch=min(case["micro_batch"] or recipe.micro_batch, share),
        sequences_per_step=share * process_count(),
        parallel="ddp" if case["way"] == "alone" else case["way"],
        gradient_checkpointing=case["checkpointing"],
    )
    with tempfile.TemporaryDirectory() as folder:
        clock = clocked(recipe, Path(folder))
    if is_first_process():
        row = row_of(clock, share * recipe.sequence_length)
        files.write_json(
            Path(case["out"]),
            {
                "tokens": share * recipe.sequence_length,
                "micro_batch": recipe.micro_batch,
                "ms": row["ms"],
                "speed": row["tokens_per_second"],
                "peak": torch.cuda.max_memory_allocated() / 2**30,
                "seconds": time.monotonic() - began,
                "groups": row["groups"],
                "kernels": clock.kernels.most_common(case["kernels"]),
            },
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
