"""How the layer types of this package appear in Transformers' caches.

A Fibonacci layer keeps an ordinary growing cache. Static caches hand out buffers longer than what has been
written, which the sparse layers cannot tell from real keys, so they are refused rather than read wrongly.
"""

from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from fibattn.errors import InputError


class FibAttnDynamicLayer(DynamicLayer):
    """The keys and values of a `fibonacci_attention` layer, growing with the sequence."""

    _layer_type = "fibonacci_attention"


class FibAttnStaticLayer(StaticLayer):
    """Registered so that asking for a static cache is answered clearly."""

    _layer_type = "fibonacci_attention"

    def __init__(self, *_: Any, **__: Any):
        raise InputError(_REFUSAL)


def check_cache(cache: Cache, layer: int) -> None:
    """Refuse a cache whose keys a sparse layer could not place.

    Raises:
        InputError: when the layer's cache is static.
    """
    if layer < len(cache.layers) and isinstance(cache.layers[layer], StaticLayer):
        raise InputError(_REFUSAL)


_REFUSAL = (
    "a static cache does not work with sparse layers in this version; "
    "leave cache_implementation out, or pass a DynamicCache"
)
