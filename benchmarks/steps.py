"""Real steps of the project's trainer, and where their time goes.

The trainer owns its loop, so the clock is a callback, and reads the wall every ten steps: what a step waits for counts.
A step's milliseconds are sorted by what the GPU did, from PyTorch's profiler over three steps; "idle" is the rest.
"""

import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from fibattn.data.prepared import TokenStream
from fibattn.data.sequences import TrainingSequences
from fibattn.data.shards import write_shard
from fibattn.training.presets import PRESETS
from fibattn.training.recipe import ModelRecipe, Recipe
from fibattn.training.run import build_model, enable_checkpointing
from fibattn.training.trainer import FibTrainer
from study.presets import STUDIES

_paper = PRESETS["paper"]
RECIPES: dict[str, Recipe] = {
    **{run.name: replace(_paper, model=run.model) for run in STUDIES["beyond"].runs},
    **{name: recipe for name, recipe in PRESETS.items() if recipe.compile},
    "stagger": _paper,
    "learned": replace(_paper, model=ModelRecipe(schedule="learned", max_offset=None)),
}
"""Presets for a GPU, and attention of the study in the paper's recipe."""
WARM, PROFILED = 12, 3
GROUPS = (
    ("attention", ("forward_kernel", "query_grad", "rung_grad", "window_grad", "resolve", "fmha", "flash")),
    ("attention", ("cudnn_generated", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "sm90_")),
    ("optimizer and clipping", ("multi_tensor", "adam", "foreach", "lpnorm")),
    ("copies", ("memcpy", "memset")),
    ("messages", ("nccl",)),
    ("fused element by element", ("triton_",)),
)


class Clock(TrainerCallback):
    """Times `timed` steps after the warm-up, then profiles a few more."""

    def __init__(self, timed: int) -> None:
        self.timed = timed
        self.times: list[float] = []
        self.kernels: Counter[str] = Counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a measurement where one is due."""
        if state.global_step == WARM:
            torch.cuda.synchronize()
            self._last = time.perf_counter()
        if state.global_step == WARM + self.timed:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the time of ten steps at once, so that waiting for the GPU does not slow them down."""
        done = state.global_step - WARM
        if 0 < done <= self.timed and done % 10 == 0:
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.times.append((now - self._last) * 100)
            self._last = now
        if done == self.timed + PROFILED:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            for event in self._profile.key_averages():
                self.kernels[event.key] += event.self_device_time_total / PROFILED / 1000


def shortened(recipe: Recipe, length: int | None, timed: int) -> Recipe:
    """A short run of a recipe, its steps at most four micro-batches.

    In sequences of another `length` a step has as many tokens, at least one sequence.
    """
    length = length or recipe.sequence_length
    micro_batch, step = (
        max(one * recipe.sequence_length // length, 1) for one in (recipe.micro_batch, recipe.sequences_per_step)
    )
    return replace(
        recipe,
        sequence_length=length,
        micro_batch=micro_batch,
        sequences_per_step=min(step, 4 * micro_batch),
        steps=WARM + timed + PROFILED,
        save_every=10**6,
    )


def clocked(recipe: Recipe, folder: Path, vocabulary: int = 32_768) -> Clock:
    """Train a little, in each of as many processes as torchrun started."""
    recipe = replace(recipe, out=folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, vocabulary, 2**20).astype(np.uint16)
    write_shard(folder / "train.bin", [tokens], np.ones(vocabulary, np.uint16), np.dtype(np.uint16), 2**20, None)
    starts = rng.integers(0, 2**20 - recipe.sequence_length - 1, recipe.steps * recipe.sequences_per_step)
    sequences = TrainingSequences(TokenStream([folder / "train.bin"]), starts, recipe.sequence_length)
    clock = Clock(recipe.steps - WARM - PROFILED)
    model = build_model(recipe, vocabulary, 0)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model)
    trainer = FibTrainer(model, recipe, sequences)
    trainer.args.save_strategy = "no"
    trainer.add_callback(clock)
    trainer.train()
    return clock


def group_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((name for name, words in GROUPS if any(word in kernel.lower() for word in words)), "other")


def row_of(clock: Clock, tokens: int) -> dict[str, Any]:
    """Milliseconds of a step of so many tokens, the median, in all and by what the GPU did."""
    step = statistics.median(clock.times)
    groups: Counter[str] = Counter()
    for kernel, milliseconds in clock.kernels.items():
        groups[group_of(kernel)] += milliseconds  # pyright: ignore[reportArgumentType]
    groups["idle"] = step - sum(groups.values())  # pyright: ignore[reportArgumentType]
    return {"ms": step, "tokens_per_second": 1000 * tokens / step, "groups": dict(groups.most_common())}
