"""Where, when and by which command a result was made."""

import sys
import time
from typing import Any

from fibattn import machine


def environment() -> dict[str, Any]:
    """The machine, the versions, the day and the command, as JSON values."""
    return {
        **machine.description(),
        **machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def heading() -> str:
    """The machine and the versions in a line."""
    return f"{machine.device_name()}: {', '.join(f'{name} {number}' for name, number in machine.versions().items())}"
