"""Where each token stands in its document, from what Transformers' callers give: masks or position ids."""

import torch
from torch import Tensor

from fibattn.errors import InputError


def document_positions(
    hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
) -> Tensor | None:
    """The position of each query inside its document, int32 (batch or 1, tokens), for `attend`.

    None when every row is one document from its first key on. Only where documents begin is taken from
    `position_ids` (where they do not go up by one), not their values: those belong to RoPE.

    Args:
        hidden: (batch, tokens, hidden size), for its shape and device.
        attention_mask: (batch, past + tokens), 0 for padding, on either side.
        position_ids: (batch or 1, tokens); looked at only without a mask and a cache, as in Transformers.
        past: how many tokens the cache holds.

    Raises:
        InputError: for a mask of another shape, or one with zeros between ones.
    """
    tokens = hidden.shape[1]
    index = torch.arange(past, past + tokens, device=hidden.device, dtype=torch.int32)
    if attention_mask is not None:
        _check_mask(attention_mask, hidden.shape[0], past + tokens)
        padding = attention_mask.to(torch.int32).argmax(dim=1, keepdim=True)
        return (index - padding).clamp(min=0).to(torch.int32)
    if position_ids is None or past:
        return None
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _check_mask(mask: Tensor, batch: int, tokens: int) -> None:
    if mask.shape != (batch, tokens):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; sparse layers take (batch, tokens) = ({batch}, {tokens}), "
            "1 for a token and 0 for padding"
        )
    if torch.compiler.is_compiling():
        return
    begins = (mask.to(torch.int32).diff(dim=1, prepend=mask.new_zeros(batch, 1, dtype=torch.int32)) > 0).sum(dim=1)
    if bool((begins > 1).any()):
        row = int(begins.argmax())
        raise InputError(
            f"row {row} of attention_mask has zeros between ones; padding must be at the ends of a row. "
            "For packed documents give position_ids that restart instead"
        )
