"""The most memory that a forward and backward pass takes.

On a GPU what PyTorch allocated, tensors in and out included. On a CPU that of a whole process that does
nothing else, PyTorch itself included: `python -m benchmarks.operator.memory PROVIDER CASE`.
"""

import gc
import json
import subprocess
import sys
from dataclasses import asdict

import torch

from benchmarks.operator.cases import Case
from benchmarks.operator.providers import PROVIDERS, Call
from fibattn.machine import process_peak


def peak_bytes(name: str, call: Call, case: Case) -> int | None:
    """Bytes at the peak; None where the operating system does not count them for a process."""
    if case.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_once(call, case)
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "win32":
        return None
    command = [sys.executable, "-m", "benchmarks.operator.memory", name, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def train_once(call: Call, case: Case) -> None:
    """One forward and backward pass; everything that goes in and comes out is alive at its end."""
    inputs = [x.requires_grad_() for x in case.inputs()]
    out = call.function(*inputs)
    torch.autograd.grad(out, [*inputs, *call.parameters], torch.ones_like(out))


if __name__ == "__main__":
    chosen = Case(**json.loads(sys.argv[2]))
    train_once(PROVIDERS[sys.argv[1]].setup(chosen), chosen)
    print(process_peak())
