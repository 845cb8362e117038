"""The process that `python -m benchmarks compare` starts for each source tree: builds cases and times them when told.

    python -P compare_worker.py CASES DEVICE

It takes one JSON object a line and answers with one: `{"do": "list"}`, `{"do": "build", "case": NAME, "outputs":
FILE}`, `{"do": "time"}`, `{"do": "drop"}`. `PYTHONPATH` decides which tree `fibattn` is.
"""

import gc
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def load(path: Path) -> Any:
    """A Python file as a module of its own, without the folder around it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class Worker:
    """The cases of one tree on one device, one of them built at a time."""

    def __init__(self, path: Path, device: str):
        self.device = device
        self.timing = load(Path(__file__).with_name("timing.py"))
        self.cases: dict[str, Any] = load(path).cases(device)
        self.case: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What comes of a request."""
        if request["do"] == "list":
            return {"cases": list(self.cases)}
        if request["do"] == "build":
            return self.build(request["case"], request["outputs"])
        if request["do"] == "time":
            chosen = {"cold": self.case.cold, "capture": self.case.capture}
            return asdict(self.timing.measure(self.case.work, self.device, **chosen))
        self.case = None
        gc.collect()
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {}

    def build(self, name: str, outputs: str) -> dict[str, Any]:
        """Build a case and keep what it computes; says the most memory of the GPU that this took."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.case = self.cases[name]()
        found = {name: tensor.cpu().contiguous() for name, tensor in self.case.outputs().items()}
        save_file(found, outputs)
        return {"peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else None}


def main() -> None:
    """Answer until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    worker = Worker(Path(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # a case that one tree cannot do must not stop the others
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
