"""Where each token stands in its document: what `attend` takes for `positions`, made from what callers have."""

from typing import Any

import torch
from torch import Tensor, nn

from fibattn.errors import InputError


def has_values(x: Tensor) -> bool:
    """Whether the values can be looked at: not while compiling, under `vmap`, or of tensors that have none."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    wrapped: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return type(x) in (Tensor, nn.Parameter) and not wrapped.is_functorch_wrapped_tensor(x)


def readable(x: Tensor) -> bool:
    """Whether looking at the values is free, too: on a GPU it would stall."""
    return x.device.type == "cpu" and has_values(x)


def packed_positions(cu_seqlens: Tensor, tokens: int, name: str = "cu_seqlens") -> Tensor:
    """The position of each token inside its document, int32 (1, tokens), of documents packed into one row.

    Args:
        cu_seqlens: integer (documents + 1,), where each document begins and the last one ends, as FlashAttention has
            it. A document may be empty. Values are not checked on a GPU, which would stall it.
        tokens: how many tokens the row has.
        name: what messages call the boundaries.

    Raises:
        InputError: for another shape or dtype, and boundaries that do not rise from 0 to `tokens`.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise InputError(f"{name} is {found}; expected integers (documents + 1,)")
    if readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[:1] != [0] or ends[-1] != tokens or ends != sorted(ends):
            raise InputError(f"{name} is {ends}; expected to rise from 0 to the {tokens} tokens of the row")
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return (index - cu_seqlens[document]).to(torch.int32)[None]


def padded_positions(mask: Tensor, tokens: int | None = None) -> Tensor:
    """The position of each token after the padding on its left, int32 (batch, tokens); padding itself has 0.

    A query then never sees the padding before it. Padding on the right needs nothing: no token looks ahead.

    Args:
        mask: (batch, all tokens), nonzero for a token and 0 for padding, as tokenizers give it.
        tokens: how many positions are asked for, those of the last tokens; all when None.

    Raises:
        InputError: for a mask that has not two dimensions, or fewer tokens than are asked for, or none.
    """
    if mask.ndim != 2 or mask.shape[1] < (1 if tokens is None else tokens):
        asked = "(batch, tokens)" if tokens is None else f"(batch, {tokens} tokens or more)"
        raise InputError(f"the mask has shape {tuple(mask.shape)}; expected {asked}, 0 for padding")
    first = 0 if tokens is None else mask.shape[1] - tokens
    index = torch.arange(first, mask.shape[1], device=mask.device, dtype=torch.int32)
    padding = (mask != 0).to(torch.int32).argmax(dim=1, keepdim=True)
    return (index - padding).clamp(min=0).to(torch.int32)
