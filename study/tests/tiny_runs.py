"""Runs of a study with the smallest of models."""

from dataclasses import replace

from fibattn.pattern import hybrid_layers
from study.presets import Run


def tiny(run: Run) -> Run:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    if len(set(run.model.layer_types)) > 1:
        shape |= hybrid_layers(3, full=(1, 2))
    return replace(run, model=replace(run.model, **shape))  # pyright: ignore[reportArgumentType]
