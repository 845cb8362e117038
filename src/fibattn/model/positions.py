"""Where each token stands in its document, from what Transformers' callers give: masks or position ids."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from fibattn.attention import documents
from fibattn.errors import InputError
from fibattn.model.configuration import FibAttnConfig


class Shard(Protocol):
    """A part of each row, whose other parts are elsewhere, as a model is given it (`fibattn.parallel`)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Any, **how: Any) -> Tensor:
        """`fibattn.attend` for the queries of this part; to everything before them where the pattern is None."""
        ...

    def before(self, parts: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Of tensors (batch, tokens, ..., size) the `count` tokens before this part, fewer where the row has fewer."""
        ...

    def positions(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        """`document_positions` of this part."""
        ...

    def with_blocks(self, positions: Tensor | None) -> "Shard":
        """The same, of a row whose queries choose blocks, which are counted as in the whole row."""
        ...


def document_positions(
    hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int | Tensor
) -> Tensor | None:
    """The position of each query inside its document, int32 (batch or 1, tokens), for `attend`.

    None when every row is one document from its first key on. Only where documents begin is taken from
    `position_ids` (where they do not go up by one), not their values: those belong to RoPE.

    Args:
        hidden: (batch, tokens, hidden size), for its shape and device.
        attention_mask: (batch, past + tokens), 0 for padding, on either side; a row begins where its padding ends.
        position_ids: (batch or 1, tokens); looked at only before a cache has anything.
        past: how many tokens the cache holds; a tensor where only the device knows.

    Raises:
        InputError: for a mask of another shape, or one with zeros between ones; for position ids that go back
            behind what the cache holds.
    """
    batch, tokens = hidden.shape[:2]
    begun = isinstance(past, Tensor) or past > 0
    if attention_mask is not None:
        before = attention_mask.shape[-1] - tokens if isinstance(past, Tensor) else past
        _check_mask(attention_mask, batch, before, tokens)
        padded = documents.padded_positions(attention_mask, tokens)
        return padded if begun or position_ids is None else torch.minimum(padded, _since_restart(position_ids))
    if position_ids is None or isinstance(past, Tensor):
        return None
    if past:
        _check_order(position_ids, past)
        return None
    return _since_restart(position_ids)


def _since_restart(position_ids: Tensor) -> Tensor:
    """How far each token is from the newest one, itself included, whose position is not the next: int32."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device, dtype=torch.int32)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def packed_positions(
    hidden: Tensor, cu_seq_lens: Tensor, attention_mask: Tensor | dict | None, cache: Cache | None
) -> Tensor:
    """The position of each token inside its document, int64 (1, tokens), of documents packed into one row.

    Args:
        hidden: (1, tokens, hidden size), for its shape and device.
        cu_seq_lens: int32 (documents + 1), where each document begins, and where the last one ends.
        attention_mask: must be None, as must `cache`.

    Raises:
        InputError: for lengths that do not fill the row, more than one row, a mask or a cache.
    """
    batch, tokens = hidden.shape[:2]
    for name, other in (("attention_mask", attention_mask), ("cache", cache)):
        if other is not None:
            raise InputError(f"cu_seq_lens_q came with {name}; packed documents have none: leave one of the two out")
    if batch != 1 or cu_seq_lens.dim() != 1:
        raise InputError(
            f"cu_seq_lens_q has shape {tuple(cu_seq_lens.shape)} for a batch of {batch}; expected (documents + 1,) "
            "and one row with all documents"
        )
    return documents.packed_positions(cu_seq_lens, tokens, "cu_seq_lens_q").long()


def says_nothing(attention_mask: Tensor) -> bool:
    """Whether nothing is padded; not asked in a graph, which the answer would break."""
    return documents.has_values(attention_mask) and bool(attention_mask.all())


def _check_order(position_ids: Tensor, past: int) -> None:
    if not documents.readable(position_ids):
        return
    if int(position_ids[:, 0].min()) < past or bool((position_ids.diff(dim=1) < 0).any()):
        raise InputError(
            f"position_ids are {position_ids.tolist()} after {past} tokens in the cache; they must go on from there. "
            "For a new sequence begin a new cache, for packed documents give none (use_cache=False)"
        )


def _check_unpacked(position_ids: Tensor, past: int | Tensor) -> None:
    if not documents.has_values(position_ids) or isinstance(past, Tensor) or past or position_ids.shape[-1] == 1:
        return
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise InputError(
            "position_ids restart or leap, and there is a cache, with which full-attention layers cannot tell packed "
            "documents apart; give no cache (use_cache=False), or an attention_mask where the rows are padded"
        )


def full_mask(
    config: FibAttnConfig,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    positions: Tensor | None,
) -> Any:
    """The mask of the full layers, in the form that their attention implementation takes; None for plain causal.

    `position_ids` are the caller's, None where there were none: Transformers looks for packed documents among
    them, which stalls a GPU. While compiling it would also build a mask for plain causal attention, and so cost
    the full layers their fast path. `positions` are those of `document_positions`.

    Raises:
        InputError: for packed documents with a cache: Transformers does not look for them then.
    """
    if cache is not None and attention_mask is None and position_ids is not None:
        _check_unpacked(position_ids, cache.get_seq_length())
    plain = attention_mask is None and position_ids is None and cache is None
    if plain and config._attn_implementation == "sdpa":
        return None
    if attention_mask is None or position_ids is None or cache is not None:
        return create_causal_mask(config, hidden, attention_mask, cache, position_ids)
    # Documents in padded rows, which Transformers would not look for beside a mask.
    assert positions is not None

    def inside(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query - key <= positions[row, query]

    return create_causal_mask(config, hidden, attention_mask, None, and_mask_function=inside)


TAKES_MASKS = ("eager", "sdpa", "flex_attention")
"""The attention implementations that a mask tells all; others (FlashAttention) read lengths of documents."""


def document_lengths(positions: Tensor, batch: int) -> dict[str, Any]:
    """Where documents begin and how long the longest is, by the names that FlashAttention's interface reads.

    The rows are laid end to end. Each token of a padding on the left counts as a document of its own; what pads on the
    right belongs to the document before it, none of whose tokens see it.

    Args:
        positions: of each token inside its document, (batch or 1, tokens).
        batch: how many rows there are.
    """
    flat = positions.expand(batch, -1).flatten()
    begins = (flat == 0).nonzero().flatten()
    boundaries = functional.pad(begins, (0, 1), value=len(flat)).to(torch.int32)
    longest = int(flat.max()) + 1
    given = {f"cu_seq_lens_{name}": boundaries for name in "qk"}
    return given | {f"max_length_{name}": longest for name in "qk"}


def _check_mask(mask: Tensor, batch: int, past: int, tokens: int) -> None:
    if mask.shape != (batch, past + tokens):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; sparse layers take (batch, tokens) = "
            f"({batch}, {past + tokens}), 1 for a token and 0 for padding"
        )
    # While tokens are generated one by one, looking at the mask would stall a GPU at each.
    if not documents.has_values(mask) or (tokens == 1 and mask.device.type != "cpu"):
        return
    check_padding(
        (mask.to(torch.int32).diff(dim=1, prepend=mask.new_zeros(batch, 1, dtype=torch.int32)) > 0).sum(dim=1)
    )


def check_padding(begins: Tensor) -> None:
    """Refuse a mask in whose rows text `begins` (batch,) more than once; not asked in a graph."""
    if documents.has_values(begins) and bool((begins > 1).any()):
        row = int(begins.argmax())
        raise InputError(
            f"row {row} of attention_mask has zeros between ones; padding must be at the ends of a row. "
            "For packed documents give position_ids that restart instead. (generate() without an attention_mask makes "
            "one from pad_token_id: give one where that token is part of the text)"
        )
