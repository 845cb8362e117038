"""Training on stages of several lengths, compiled as on a GPU but for the code that it makes."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fibattn import FibAttnForCausalLM
from fibattn.training.recipe import OptimizerRecipe
from study.probes import fit as room
from study.probes.recall import TASKS, training_rows, variants


def trained(variant: str) -> float:
    torch.manual_seed(0)
    model = FibAttnForCausalLM(variants(512, window=8, layers=3)[variant])
    stages = [room.Stage(training_rows(512 // length, length, 8, TASKS, 0), 1, 512 // length) for length in (128, 256)]
    return room.fit(model, stages, optimizer=OptimizerRecipe(warmup_steps=1), label="test")


@pytest.mark.parametrize("variant", ["stagger", "hybrid"])
def test_one_graph_has_all_layers_and_serves_all_lengths(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    plain, counter = trained(variant), CompileCounterWithBackend("aot_eager")

    def compiled(model: nn.Module, where: torch.device, *, lengths_differ: bool) -> nn.Module:
        return torch.compile(model, backend=counter, dynamic=lengths_differ)  # pyright: ignore

    monkeypatch.setattr(room, "_compiled", compiled)
    assert trained(variant) == pytest.approx(plain, rel=1e-5)
    assert counter.frame_count == 1
