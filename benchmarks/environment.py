"""Where, when and by which command a result was made."""

import shlex
import sys
import time
from typing import Any

import torch

from fibattn import machine
from fibattn.errors import InputError


def environment() -> dict[str, Any]:
    """The machine, the versions, the day and the command, as JSON values."""
    return {
        **machine.description(),
        **machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
    }


def heading() -> str:
    """The machine and the versions in a line."""
    return f"{machine.device_name()}: {', '.join(f'{name} {number}' for name, number in machine.versions().items())}"


def need_gpu() -> None:
    """Refuse to time the kernels of a GPU where there is none."""
    if not torch.cuda.is_available():
        raise InputError("kernels are timed on a GPU, and PyTorch finds no NVIDIA GPU here; run it where one is")


def device_of(asked: str) -> str:
    """`cuda` or `cpu`; `auto` is the GPU where there is one.

    Raises:
        InputError: for a GPU that is not there.
    """
    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise InputError("--device cuda was given, but PyTorch finds no NVIDIA GPU here; use --device cpu")
    return ("cuda" if found else "cpu") if asked == "auto" else asked
