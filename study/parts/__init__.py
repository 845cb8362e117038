"""Trials of parts of the model, in the recipe of a step: what public speed-runs have and the default has not."""
