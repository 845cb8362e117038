"""A recipe small enough to train in seconds."""

from dataclasses import replace
from pathlib import Path

import pytest

from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe


@pytest.fixture
def recipe(prepared: Path, tmp_path: Path) -> Recipe:
    shape = ModelRecipe(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, window=4)
    base = Recipe(
        data=prepared,
        out=tmp_path / "run",
        model=shape,
        sequence_length=32,
        sequences_per_step=4,
        micro_batch=2,
        evaluate_tokens=256,
    )
    return replace(
        base, steps=12, save_every=3, log_every=1, optimizer=OptimizerRecipe(learning_rate=3e-3, warmup_steps=4)
    )
