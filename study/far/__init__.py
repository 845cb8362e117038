"""Trials of far reading: forms in plain PyTorch at the cost of dense attention, each trained as the default recipe."""
