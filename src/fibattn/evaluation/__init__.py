"""Evaluation: one pass of per-position loss, and what can be read from it."""
