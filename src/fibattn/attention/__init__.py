"""The operator: causal attention over a window and a few fixed distances. Knows nothing of models."""

from fibattn.attention.api import attend, attend_cached

__all__ = ["attend", "attend_cached"]
