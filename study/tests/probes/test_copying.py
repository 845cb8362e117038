"""Copying, asked of models that can and cannot."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fibattn import FibAttnForCausalLM
from study.probes.copying import copying, distances

VOCABULARY = 50


class Copier(nn.Module):
    """Names the token after the last time that it read the same one, at most `reach` tokens ago."""

    def __init__(self, reach: int):
        super().__init__()
        self.reach, self.head = reach, nn.Linear(1, VOCABULARY)
        self.longest = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        self.longest = max(self.longest, input_ids.numel())
        named = torch.zeros_like(input_ids)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(self.reach, len(ids)):
                if ids[place - self.reach] == ids[place]:
                    named[row, place] = ids[place - self.reach + 1]
        return SimpleNamespace(logits=functional.one_hot(named, VOCABULARY).float())


def test_a_copier_copies_from_its_distance_alone() -> None:
    model = Copier(reach=40)
    found = copying(model, [10, 40], sequences=120)
    assert list(found) == ["10", "40"]
    assert found["40"] == 1.0
    assert found["10"] < 0.1
    assert model.longest <= 4096


def test_an_untrained_model_does_not(model: FibAttnForCausalLM) -> None:
    found = copying(model, distances(64))
    assert found == copying(model, distances(64))
    assert found != copying(model, distances(64), seed=1)
    assert max(found.values()) < 0.1


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1024, [16, 64, 256, 512, 1024, 4096]), (128, [2, 8, 32, 64, 128, 512]), (32, [2, 8, 16, 32, 128])],
)
def test_distances_are_parts_of_the_training_length_and_multiples(length: int, expected: list[int]) -> None:
    assert distances(length) == expected
