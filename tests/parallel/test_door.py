"""What is refused before a model is prepared for several processes."""

from collections.abc import Iterator

import foreign_decoders
import pytest
import tiny_models
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from torch import nn

from fibattn import FibAttention, InputError, Pattern, convert

MODELS = {
    "own": tiny_models.model,
    "converted": lambda: convert(foreign_decoders.model(), window=2),
    "a layer in another model": lambda: nn.Sequential(FibAttention(16, 2, Pattern(2))),
}


@pytest.fixture
def sharding(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """An accelerator that was asked to cut sequences; the configuration is put there, since one process allows none."""
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["parallelism_config"] = ParallelismConfig(**request.param)
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("sharding", [{"sp_size": 2}], indirect=True, ids=["sp"])
@pytest.mark.parametrize("kind", MODELS)
def test_sequences_are_not_cut_behind_the_layers(sharding: Accelerator, kind: str) -> None:
    model = MODELS[kind]()
    with pytest.raises(InputError, match=r"sp_size is 2.* set cp_size to 2"):
        sharding.prepare(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("sharding", [{"cp_size": 4}], indirect=True, ids=["cp"])
def test_a_layer_in_another_model_cannot_be_told_of_the_cut(sharding: Accelerator) -> None:
    with pytest.raises(InputError, match="cp_size is 4, and a Sequential with FibAttention layers"):
        sharding.prepare(MODELS["a layer in another model"]())


@pytest.mark.parametrize("sharding", [{}], indirect=True, ids=["whole"])
def test_whole_sequences_are_prepared(sharding: Accelerator) -> None:
    model = tiny_models.model()
    assert sharding.prepare(model) is model
