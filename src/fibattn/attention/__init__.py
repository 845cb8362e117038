"""The operator: causal attention over a window and a few fixed distances. Knows nothing of models."""

from fibattn.attention.api import attend, attend_cached
from fibattn.attention.cache import AttentionCache
from fibattn.attention.chosen import attend_chosen, attend_chosen_cached
from fibattn.attention.documents import padded_positions

__all__ = ["AttentionCache", "attend", "attend_cached", "attend_chosen", "attend_chosen_cached", "padded_positions"]
