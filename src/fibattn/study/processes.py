"""The same command several times side by side, each process with a GPU of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO


def side_by_side(arguments: Sequence[str], processes: int) -> int:
    """Run `fibattn ARGUMENTS` in `processes` processes, lines marked by process; the highest exit status."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fibattn", *arguments],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": devices[index % len(devices)], "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for index in range(processes)
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


def _pass_on(lines: IO[str] | None, index: int) -> None:
    for line in lines or ():
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)
