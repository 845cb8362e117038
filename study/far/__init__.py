"""Trials of far reading: forms in plain PyTorch at the cost of dense attention, in the recipe of a step."""
