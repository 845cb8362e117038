"""Runs of a study, and a recipe, with the smallest of models."""

from dataclasses import replace

from fibattn.pattern import hybrid_layers
from fibattn.training.recipe import ModelRecipe, OptimizerRecipe, Recipe
from study.presets import Run

HYBRID = Recipe(
    model=ModelRecipe(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, qk_norm=True,
        **hybrid_layers(2, full=(1,)),
    ),
    optimizer=OptimizerRecipe(learning_rate=3e-3, muon=True),
    sequence_length=64, sequences_per_step=4, micro_batch=4, log_every=1,
)  # fmt: skip
"""In place of the default recipe, for trials."""


def tiny(run: Run) -> Run:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    if len(set(run.model.layer_types)) > 1:
        shape |= hybrid_layers(3, full=(1, 2))
    return replace(run, model=replace(run.model, **shape))  # pyright: ignore[reportArgumentType]
