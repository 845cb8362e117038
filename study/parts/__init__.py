"""Trials of parts of the model, each in the default recipe: what public speed-runs have and the library has not."""
