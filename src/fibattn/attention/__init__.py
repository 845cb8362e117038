"""The operator: causal attention over a window and a few fixed distances. Knows nothing of models."""

from fibattn.attention.api import attend, attend_cached
from fibattn.attention.documents import padded_positions

__all__ = ["attend", "attend_cached", "padded_positions"]
