"""The same command several times side by side, spread over the GPUs.

Two processes a GPU finish more runs than one: while one compiles or evaluates, the other trains (`turns.py`). It is
slower for it, so results say how many shared a GPU (`PROCESSES_A_GPU`).
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

PROCESSES_A_GPU = "FIBATTN_PROCESSES_A_GPU"
"""The environment variable by which a process knows how many share its GPU."""


def side_by_side(arguments: Sequence[str], processes: int) -> int:
    """Run `fibattn ARGUMENTS` in `processes` processes, lines marked by process; the highest exit status."""
    available = _devices()
    devices = [available[index % len(available)] for index in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fibattn", *arguments],
            env=os.environ
            | {"CUDA_VISIBLE_DEVICES": device, PROCESSES_A_GPU: str(devices.count(device)), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for device in devices
    ]
    threads = [threading.Thread(target=_pass_on, args=(process.stdout, index)) for index, process in enumerate(started)]
    for thread in threads:
        thread.start()
    try:
        return max(abs(process.wait()) for process in started)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for thread in threads:
            thread.join()


def _devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; one entry without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")
    import torch

    return [str(index) for index in range(max(torch.cuda.device_count(), 1))]


def _pass_on(lines: IO[str] | None, index: int) -> None:
    for line in lines or ():
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)
