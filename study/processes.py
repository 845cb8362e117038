"""The same command several times side by side, spread over the GPUs.

Two processes a GPU finish more runs than one: while one compiles or evaluates, the other trains (`turns.py`). It is
slower for it, so results say how many shared a GPU (`PROCESSES_A_GPU`).
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, NoReturn

PROCESSES_A_GPU = "FIBATTN_PROCESSES_A_GPU"
"""The environment variable by which a process knows how many share its GPU."""


def as_flags(chosen: object, but: Sequence[str] = ()) -> list[str]:
    """The flags that give a verb these arguments, those in `but` left out."""
    words = []
    for name, value in vars(chosen).items():
        flag = f"--{name.replace('_', '-')}"
        if name in but or value is None or value == ():
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def side_by_side(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m study ARGUMENTS` in `processes` processes, lines marked by process; the highest exit status.

    A SIGTERM stops them all, as Ctrl-C does.
    """
    available = _devices()
    devices = [available[index % len(available)] for index in range(processes)]
    started: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for index, device in enumerate(devices):
            started.append(_start(arguments, device, devices.count(device)))
            threads.append(threading.Thread(target=_pass_on, args=(started[-1].stdout, index)))
            threads[-1].start()
        return max(abs(process.wait()) for process in started)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGTERM, before)


def _start(arguments: Sequence[str], device: str, a_gpu: int) -> subprocess.Popen[str]:
    own = {"CUDA_VISIBLE_DEVICES": device, PROCESSES_A_GPU: str(a_gpu), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "study", *arguments],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


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
