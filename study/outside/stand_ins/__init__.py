"""Modules that karpathy/autoresearch's `train.py` imports by these names; here they bring the study's text to it."""
