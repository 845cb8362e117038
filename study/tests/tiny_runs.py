"""Runs of a study with the smallest of models."""

from dataclasses import replace

from study.presets import Run


def tiny(run: Run) -> Run:
    layers = tuple(layer for layer in (1, 2) if run.model.full_layers)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "full_layers": layers}
    return replace(run, model=replace(run.model, **shape))  # pyright: ignore[reportArgumentType]
