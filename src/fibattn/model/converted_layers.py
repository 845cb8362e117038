"""What runs inside a converted Transformers decoder: its attention, its mask, and the hooks that feed them.

A forward knows where padding ends and documents begin; a layer of it is only handed a mask. So what a
converted decoder passes for a mask is, for every query, its position inside its document, int32
(batch or 1, 1, tokens, 1): Transformers hands a mask of four dimensions on as it is. Sparse layers attend by
it; layers that keep their own attention have a mask made of it, sized for their own cache. A sparse layer's
cache is taken from it before it can write there: the operator writes to the layer's ring itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fibattn.errors import InputError
from fibattn.model import batching
from fibattn.model.attention import attend_with_ring
from fibattn.model.cache import RingLayer, check_full, ring_of
from fibattn.model.converted_pattern import STORED_PATTERN, ConvertedLayer
from fibattn.model.positions import Shard, document_positions, packed_positions, says_nothing
from fibattn.pattern import ChosenPattern

IMPLEMENTATION = "fibattn"
"""The name that the attention and its mask have in Transformers' registries."""

_FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids")


def before_decoder(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """A decoder's forward pre-hook: put the positions inside documents in the place of the mask.

    Raises:
        InputError: for more than three unnamed arguments, and masks, positions or `cu_seq_lens_q` as in
            `document_positions` and `packed_positions`.
    """
    if len(args) > len(_FORWARD_ARGUMENTS):
        raise InputError(f"{len(args)} unnamed arguments; name those after {', '.join(_FORWARD_ARGUMENTS)}")
    given = {**dict(zip(_FORWARD_ARGUMENTS, args, strict=False)), **kwargs}
    mask, tokens, cache = given.get("attention_mask"), given.get("input_ids"), _cache(given)[1]
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if isinstance(cache, PagedAttentionCache):
        # What stands for a mask is taken as it is; attention reads where requests begin.
        given["fibattn_full_mask"] = batching.mask_of_full_layers(mask)
        given["attention_mask"] = _as_mask(given["position_ids"].to(torch.int32))
        return (), given
    # `generate` makes the mask ahead where the cache is static: one, or one for every type of layer.
    if tokens is not None and not isinstance(mask, dict) and not _holds_positions(mask):
        documents, past = given.get("position_ids"), 0 if cache is None else cache.get_seq_length()
        if given.get("cu_seq_lens_q") is not None:
            documents = packed_positions(tokens, given["cu_seq_lens_q"], mask, cache)
        if given.get("position_ids") is None:
            given["position_ids"] = documents
        if mask is not None and cache is not None:
            documents = None  # `generate` gives both; with a cache, only padding tells rows apart
        shard: Shard | None = given.get("shard")
        if shard is not None:
            positions = shard.positions(mask, documents)
            if "blocks" in getattr(decoder.config, STORED_PATTERN):
                given["shard"] = shard.with_blocks(positions)
        else:
            positions = document_positions(tokens, mask, documents, past)
            if mask is not None and documents is None and tokens.shape[1] > 1 and says_nothing(mask):
                positions = None
        given["attention_mask"] = _as_mask(positions)
    return (), given


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An attention module's forward pre-hook: hand a sparse layer its ring, any other a mask of its own.

    Raises:
        InputError: when another attention has been set on the converted model, and for a cache that another
            model or pattern has written.
    """
    used = module.config._attn_implementation  # pyright: ignore
    if used != IMPLEMENTATION:
        raise InputError(
            f"the attention of a converted model was set to {used!r}; call fibattn.restore(model) first, it puts the "
            "model's own attention back"
        )
    own, index = _converted(module), int(module.layer_idx)  # pyright: ignore
    name, cache = _cache(kwargs)
    if isinstance(cache, PagedAttentionCache) or kwargs.get("shard") is not None:
        return args, kwargs
    if own.pattern is None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, {**kwargs, "attention_mask": _dense_mask(own, hidden, kwargs.get("attention_mask"), cache, index)}
    if cache is None:
        return args, kwargs
    ring = ring_of(cache, index, (own.pattern,), own.pattern.reach)
    return args, {**kwargs, name: None, "fibattn_ring": ring}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    fibattn_ring: RingLayer | None = None,
    shard: Shard | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a converted layer, in the form of Transformers' `AttentionInterface`.

    Args:
        query: (batch, query heads, tokens, head size); key, value: (batch, KV heads, tokens, head size).
        attention_mask: positions inside documents, (batch or 1, 1, tokens, 1) int32, or None.
        fibattn_ring: the layer's ring where there is a cache.
        shard: which part of each row these tokens are, where it is cut.

    Returns:
        (batch, tokens, query heads, head size), and no weights.
    """
    own = _converted(module)
    if "read_index" in kwargs:
        return _attend_batch(module, own, query, key, value, scaling=scaling, **kwargs)
    if own.pattern is None and shard is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Norms and rotations in float32 leave queries and keys wider than values under autocast.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    positions = None if attention_mask is None else attention_mask[:, 0, :, 0]
    how: dict[str, Any] = {"positions": positions, "scale": scaling}
    if isinstance(own.pattern, ChosenPattern):
        how["trust"] = module.trust if hasattr(module, "trust") else k.new_zeros(k.shape[2])
    if shard is not None:
        return shard.attend(q, k, v, own.bounded, **how), None
    assert own.pattern is not None
    at: Any = None
    if fibattn_ring is not None:
        at = torch.arange(k.shape[1], device=k.device)[None] + fibattn_ring.get_seq_length()
    return attend_with_ring(q, k, v, own.pattern, fibattn_ring, at, **how), None


def _attend_batch(
    module: nn.Module,
    own: ConvertedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    fibattn_full_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention` for the requests of continuous batching."""
    if own.bounded is None:
        full: Any = ALL_ATTENTION_FUNCTIONS[batching.CONVERTED_FULL]
        return full(module, query, key, value, fibattn_full_mask, scaling=scaling, **kwargs)
    if kwargs.get("cache") is not None:
        # Before 5.20 layers leave it to their attention to update the cache.
        key, value = batching.update(kwargs["cache"], key, value, int(module.layer_idx), kwargs)  # pyright: ignore
    query, key = (x.to(value.dtype) for x in (query, key))
    pattern: Any = own.bounded  # one that chooses did not come this far
    return batching.attend_batch(query.transpose(1, 2), key, value, pattern, kwargs, scale=scaling), None


def mask(
    batch_size: int, q_length: int, q_offset: int | Tensor, attention_mask: Tensor | None, device: Any, **_: Any
) -> Tensor | None:
    """What stands for a mask, in the form of Transformers' `AttentionMaskInterface`."""
    tokens = torch.empty(batch_size, q_length, 0, device=device)
    return _as_mask(document_positions(tokens, attention_mask, None, q_offset))


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, mask)


def _converted(module: nn.Module) -> ConvertedLayer:
    own = getattr(module, "fibattn", None)
    if own is None:
        raise InputError(
            "this model's attention is 'fibattn', but it has not been converted: load a converted model's folder as "
            "it is, or call fibattn.convert(model, window=…) on the original"
        )
    return own


def _cache(arguments: dict[str, Any]) -> tuple[str, Any]:
    """The cache and its name; Transformers renamed `past_key_values` to `cache` in the course of version 5."""
    name = "cache" if arguments.get("cache") is not None else "past_key_values"
    return name, arguments.get(name)


def _holds_positions(given: Any) -> bool:
    return isinstance(given, Tensor) and given.ndim == 4 and given.dtype == torch.int32 and given.shape[-1] == 1


def _as_mask(positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions[:, None, :, None]


def _dense_mask(
    own: ConvertedLayer, hidden: Tensor, positions: Tensor | None, cache: Cache | None, index: int
) -> Tensor | None:
    """The mask of a layer that keeps its own attention, bool (batch or 1, 1, tokens, keys); None for plain causal."""
    tokens = keys = hidden.shape[1]
    past: Any = 0
    first: Any = 0
    if cache is not None:
        _check_own(cache, own, index, tokens)
        past = cache.get_query_offset(index)
        keys, first = cache.get_mask_sizes(tokens, index)
    window = own.sliding_window
    if positions is None and keys == tokens and (window is None or tokens <= window):
        return None
    query = torch.arange(tokens, device=hidden.device)[:, None] + past
    distance = query - (torch.arange(keys, device=hidden.device) + first)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    return seen[None, None] if positions is None else seen & (distance <= positions)


def _check_own(cache: Cache, own: ConvertedLayer, index: int, tokens: int) -> None:
    if own.sliding_window is None:
        check_full(cache, index, tokens)
    elif index < len(cache.layers) and isinstance(cache.layers[index], RingLayer):
        raise InputError(
            f"layer {index} of the cache was written for a sparse layer, the model's layer has a sliding window; "
            "a cache belongs to the model that made it: begin a new one"
        )
