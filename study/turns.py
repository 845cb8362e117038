"""Turns on a shared GPU: one of its processes trains and evaluates; the others load, compile, or wait.

Two that work at once would also take turns, but every few milliseconds, and together they are a fifth slower than
one alone (`docs/log.md`).
"""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from study.processes import PROCESSES_A_GPU

_COMPILED = 3
"""After so many steps everything is compiled, and a CUDA graph recorded."""


def processes_a_gpu() -> int | None:
    """How many processes share this one's GPU; None without a GPU."""
    return int(os.environ.get(PROCESSES_A_GPU, "1")) if torch.cuda.is_available() else None


class Turn(TrainerCallback):
    """Waits for the GPU after the first steps of a training; `end` gives it up.

    The turn is a lock on a file, which the system gives back when a process and those it forked have ended.
    """

    def __init__(self, lock: Path):
        self.lock = lock.open("w")
        self.waited = 0.0
        """Seconds."""
        self._steps, self._taken = 0, False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait, once this process has compiled."""
        self._steps += 1
        if self._steps == _COMPILED:
            self.take()

    def take(self) -> None:
        """Wait, unless the turn is this process's already."""
        if not self._taken:
            began = time.monotonic()
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            self.waited, self._taken = time.monotonic() - began, True

    def end(self) -> None:
        """Let the next one have the GPU, also when workers of a training that failed still hold the file open."""
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.lock.close()


@contextmanager
def turn(folder: Path) -> Iterator[list[Turn]]:
    """What makes a training take turns with others that use `folder`: nothing where it has its GPU for itself.

    The turn lasts until this context ends, so that what follows the training belongs to it.
    """
    if (processes_a_gpu() or 1) == 1:
        yield []
        return
    folder.mkdir(parents=True, exist_ok=True)
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").replace("/", "-")
    one = Turn(folder / f"turn-{platform.node()}-gpu{device}.lock")
    try:
        yield [one]
    finally:
        one.end()
