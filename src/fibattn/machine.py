"""What this process runs on, in which versions, and the memory that it takes: for results, cards and progress."""

import os
import platform
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fibattn._version import __version__
from fibattn.errors import InputError

_PACKAGES = ("torch", "transformers", "accelerate", "triton", "numpy")


def device_name() -> str:
    """The GPU's name where PyTorch finds one, else the processor's, with the threads that PyTorch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def description() -> dict[str, Any]:
    """The hardware of this process and its drivers, as JSON values."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": device_name(),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """The versions that may move a result; packages that are not installed are left out."""
    found = {"fibattn": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_compiler() -> None:
    """Refuse to compile for a CPU where PyTorch would call its compiler with a path that it does not quote."""
    for path in (torch.__path__[0], os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())):
        if " " in path:
            raise InputError(
                f"PyTorch cannot compile for a CPU from or into {path!r}, for the blank in it; leave --compile out, or "
                "have the environment and TORCHINDUCTOR_CACHE_DIR elsewhere"
            )


def peak_memory() -> int:
    """The most bytes that this process has held: of the GPU's memory where there is one, else of the machine's."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak()


def process_peak() -> int:
    """The most bytes of the machine's memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux `getrusage` would count the process that started this one, up to the moment it did.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _processor() -> str:
    """The processor's name where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
