"""Time a training step of the paper's 60 M-parameter model under the project's own trainer, and say where it goes.

    PYTHONPATH=src python benchmarks/training_step.py [--models dense stagger ...] [--length 1024] [--json FILE]

A model is `stagger`, `learned` or a run of the study `beyond`, such as `hybrid-w128`.
Real steps of `fibattn.training.trainer.FibTrainer`: as many windows of `--length` as 32,768 tokens hold, at least one;
bf16 autocast, compiled. The tokens are random; their values do not change the time. A step's milliseconds are sorted
by what the GPU did, from PyTorch's profiler over three steps; "idle" is the rest of the step.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
import triton
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from fibattn.data.prepared import TokenStream
from fibattn.data.sequences import TrainingWindows
from fibattn.data.shards import write_shard
from fibattn.training.recipe import PRESETS, ModelRecipe, Recipe
from fibattn.training.run import build_model
from fibattn.training.trainer import FibTrainer
from study.presets import STUDIES

STANDARD = ("dense", "stagger", "learned", "hybrid")
MODELS = {
    "stagger": ModelRecipe(clip_offsets=False),
    "learned": ModelRecipe(schedule="learned", clip_offsets=False),
    **{run.name: run.model for run in STUDIES["beyond"].runs},
}
WARM, PROFILED = 12, 3
STEP_TOKENS = 32_768
GROUPS = (
    (
        "attention",
        ("forward_kernel", "query_grad", "rung_grad", "window_grad", "resolve", "fmha", "flash"),
    ),
    ("attention", ("cudnn_generated", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "sm90_")),
    ("optimizer and clipping", ("multi_tensor", "adam", "foreach", "lpnorm")),
    ("copies", ("memcpy", "memset")),
    ("fused element by element", ("triton_",)),
)


class Clock(TrainerCallback):
    """Times `timed` steps after the warm-up, then profiles a few more."""

    def __init__(self, timed: int) -> None:
        self.timed = timed
        self.times: list[float] = []
        self.kernels: Counter[str] = Counter()

    def on_step_begin(self, args, state, control, **_) -> None:
        """Begin a measurement where one is due."""
        if state.global_step == WARM:
            torch.cuda.synchronize()
            self._last = time.perf_counter()
        if state.global_step == WARM + self.timed:
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_step_end(self, args, state, control, **_) -> None:
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


def recipe_of(model: ModelRecipe, length: int, timed: int) -> Recipe:
    """A short run of the paper's recipe."""
    windows = max(STEP_TOKENS // length, 1)
    size = {"length": length, "windows_per_step": windows, "micro_batch": windows}
    return replace(PRESETS["paper"], model=model, steps=WARM + timed + PROFILED, save_every=10**6, **size)


def run(recipe: Recipe, folder: Path) -> Clock:
    """Train a little."""
    recipe = replace(recipe, out=folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 32_768, 2**20).astype(np.uint16)
    write_shard(folder / "train.bin", [tokens], np.ones(32_768, np.uint16), np.dtype(np.uint16), 2**20, None)
    starts = rng.integers(0, 2**20 - recipe.length - 1, recipe.steps * recipe.windows_per_step)
    windows = TrainingWindows(TokenStream([folder / "train.bin"]), starts, recipe.length)
    clock = Clock(recipe.steps - WARM - PROFILED)
    trainer = FibTrainer(build_model(recipe, 32_768, 0), recipe, windows, 1)
    trainer.args.save_strategy = "no"
    trainer.add_callback(clock)
    trainer.train()
    return clock


def group_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((name for name, words in GROUPS if any(word in kernel.lower() for word in words)), "other")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(STANDARD), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--timed", type=int, default=40, help="steps to time, a multiple of ten")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", type=int, default=0, help="how many single kernels to name")
    arguments = parser.parse_args()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Transformers {transformers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}")
    results = {"device": torch.cuda.get_device_name(), "versions": versions, "length": arguments.length, "models": {}}
    for name in arguments.models:
        recipe = recipe_of(MODELS[name], arguments.length, arguments.timed)
        with tempfile.TemporaryDirectory() as folder:
            clock = run(recipe, Path(folder))
        step, tokens = statistics.median(clock.times), recipe.windows_per_step * recipe.length
        groups: Counter[str] = Counter()
        for kernel, milliseconds in clock.kernels.items():
            groups[group_of(kernel)] += milliseconds
        groups["idle"] = step - sum(groups.values())
        results["models"][name] = {"ms": step, "tokens_per_second": 1000 * tokens / step, "groups": dict(groups)}
        parts = ", ".join(f"{group} {milliseconds:.1f}" for group, milliseconds in groups.most_common())
        print(f"{name}: {step:.1f} ms a step, {tokens / step:,.0f} k tokens/s ({parts})", flush=True)
        for kernel, milliseconds in clock.kernels.most_common(arguments.kernels):
            print(f"    {milliseconds:7.2f}  {group_of(kernel):<24} {kernel[:100]}", flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
