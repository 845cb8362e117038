"""In place of the package of this name, which fetches FlashAttention 3 from a hub: PyTorch's own attention.

Flex attention for windows, cuDNN's for layers that see everything.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from study.outside.stand_ins.prepare import MAX_SEQ_LEN

_MASKS: dict[int, BlockMask] = {}


def get_kernel(_: str) -> SimpleNamespace:
    """An object with `flash_attn_interface.flash_attn_func`, for windows of the shapes that the program has."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    for window in (MAX_SEQ_LEN // 8, MAX_SEQ_LEN // 2):
        _MASKS[window] = window_mask(window, MAX_SEQ_LEN, "cuda")
    return SimpleNamespace(flash_attn_interface=SimpleNamespace(flash_attn_func=flash_attn_func))


def window_mask(window: int, length: int, device: str) -> BlockMask:
    """Distances 0 … window, as FlashAttention counts them."""

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window)

    return create_block_mask(seen, None, None, length, length, device=device)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """FlashAttention's interface, causal: (batch, tokens, heads, head size) in and out."""
    assert causal
    assert window_size[1] == 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window_size[0] >= q.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    out = flex_attention(q, k, v, block_mask=_MASKS[window_size[0]])
    return out.transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]
