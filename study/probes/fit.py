"""Training for probes that bring their own synthetic data: the recipe's optimizer in a loop, no files.

A run of the study goes through `fibattn.training`. Here a model lives for minutes and is measured at once: there is
nothing to resume but a probe that was cut between two rows.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from fibattn.errors import InputError
from fibattn.progress import Meter
from fibattn.training.optimizers import build_optimizer
from fibattn.training.recipe import OptimizerRecipe
from fibattn.training.trainer import rate_factor

_LOOK_EVERY = 25
_WORKERS = min(8, os.cpu_count() or 1)  # rows are made one by one, and a GPU would wait for short ones

Keep = Callable[[dict[str, Any]], None]
"""What a probe calls with its result so far, whenever it has another row."""


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(where: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU, full precision on the CPU."""
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == "cuda")


def rows_of(earlier: dict[str, Any] | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier result, which need not be made again.

    Raises:
        InputError: when that was made with other settings.
    """
    if earlier is None:
        return []
    if not isinstance(earlier.get("rows"), list):
        raise InputError("the earlier result is not one of this probe; give a new --out, or move the file away")
    changed = [name for name, value in settings.items() if earlier.get(name) != value]
    if changed:
        details = "; ".join(f"{name} was {earlier.get(name)} and is now {settings[name]}" for name in changed)
        raise InputError(f"the earlier result was made differently: {details}. Give a new --out, or the old values")
    return list(earlier["rows"])


@dataclass(frozen=True)
class Stage:
    """A part of a training: its first `steps * batch` items, in order."""

    data: Dataset[dict[str, torch.Tensor]]
    """Items of `input_ids` and `shift_labels`, int64 (tokens,), all of one length."""
    steps: int
    batch: int
    """Items of a step."""


def fit(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    optimizer: OptimizerRecipe,
    label: str,
    before_step: Callable[[int], None] | None = None,
) -> float:
    """Train `model` on one stage after another, with one schedule of the rate over all of them.

    Args:
        model: a Transformers causal language model, on its device.
        stages: what it is trained on; they may differ in length.
        optimizer: rate, decay and clipping, as in a recipe.
        label: what the progress line is called.
        before_step: called with the number of the step (from 0) before it, to anneal something.

    Returns:
        The mean loss in nats of the last tenth of the steps.

    Raises:
        InputError: when the loss stops being finite.
    """
    where = next(model.parameters()).device
    torch._dynamo.reset()
    compiled = _compiled(model, where, lengths_differ=len(stages) > 1)
    adam = build_optimizer(model, optimizer)
    steps = sum(stage.steps for stage in stages)
    rates = LambdaLR(adam, lambda done: rate_factor(done + 1, optimizer, steps))
    last = torch.zeros((), device=where)
    counted = max(1, steps // 10)
    model.train()
    # Where lengths differ, plain numbers would be symbols too; but they never change.
    with Meter(label, steps, "steps") as meter, torch._dynamo.config.patch(specialize_float=True):
        for step, items in enumerate(_batches(stages, _WORKERS if where.type == "cuda" else 0)):
            if before_step is not None:
                before_step(step)
            with autocast(where):
                inputs, targets = (items[name].to(where) for name in ("input_ids", "shift_labels"))
                loss = compiled(input_ids=inputs, shift_labels=targets, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
            adam.step()
            rates.step()
            adam.zero_grad()
            last += loss.detach() * (step >= steps - counted)
            looked = step % _LOOK_EVERY == 0
            meter.update(1, _checked(loss, step, label, optimizer) if looked else meter.note)
    return float(last) / counted


def _compiled(model: nn.Module, where: torch.device, *, lengths_differ: bool) -> nn.Module:
    """On a GPU, once for all lengths: so small a model would wait for its launches, and a CUDA graph has none."""
    if where.type != "cuda":
        return model
    return torch.compile(model, mode="reduce-overhead", dynamic=lengths_differ or None)  # pyright: ignore


def _batches(stages: Sequence[Stage], workers: int) -> Iterator[dict[str, torch.Tensor]]:
    for stage in stages:
        loader = DataLoader(stage.data, batch_size=stage.batch, num_workers=workers)
        yield from itertools.islice(loader, stage.steps)


def _checked(loss: torch.Tensor, step: int, label: str, optimizer: OptimizerRecipe) -> str:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"{label}: the loss is {value} at step {step + 1}; try a learning rate below {optimizer.learning_rate}"
        )
    return f"loss {value:.3f}"
