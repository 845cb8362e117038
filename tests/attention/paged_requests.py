"""Requests of several lengths whose keys lie in pages, and what each gives by itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fibattn.attention import attend
from fibattn.attention.paged import Batch
from fibattn.pattern import reach_of

MIX = ((5, 1), (40, 1), (37, 20), (9, 9), (0, 0), (1, 1), (64, 3))
"""Tokens that a request has, and how many of them are new; the fifth has gone."""
STEPS = ((5, 1), (0, 1), (40, 1), (1, 1), (33, 1))
"""One new token each; the second is padding."""


def requests(
    sizes: Sequence[tuple[int, int]],
    pattern: Any,
    *,
    alpha: Tensor | None = None,
    kv_heads: int = 2,
    group: int = 2,
    size: int = 16,
    rows: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Batch, Tensor]:
    """Queries, pages of keys, pages of values, whose they are, and the output by the reference.

    Pages are shuffled, lie as vLLM's do (heads before rows, keys beside values) and hold NaN where nothing may be read.
    """
    torch.manual_seed(0)
    pages = 4 + sum(-(-length // rows) for length, _ in sizes)
    both = torch.full((pages, kv_heads, rows, 2 * size), torch.nan, dtype=dtype, device=device).transpose(1, 2)
    k_pages, v_pages = both[..., :size], both[..., size:]
    free = torch.randperm(pages).tolist()
    table = torch.zeros(len(sizes), max(-(-length // rows) for length, _ in sizes), dtype=torch.int32)
    q = torch.randn(sum(new for _, new in sizes), kv_heads * group, size, device=device).to(dtype)
    starts, outputs = [0], []
    reach = reach_of(pattern, 0.0 if alpha is None else float(alpha))
    for request, (length, new) in enumerate(sizes):
        k, v = torch.randn(2, length, kv_heads, size, device=device).to(dtype)
        mine = [free.pop() for _ in range(-(-length // rows))]
        table[request, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for position in range(max(0, length - new - reach), length):
            at = mine[position // rows], position % rows
            k_pages[at], v_pages[at] = k[position], v[position]
        starts.append(starts[-1] + new)
        own = q[None, starts[-2] : starts[-1]]
        if new and length:
            outputs.append(attend(own, k[None], v[None], pattern, alpha=alpha, backend="reference")[0])
        else:
            outputs.append(torch.zeros_like(own[0]))
    lengths = [length for length, _ in sizes]
    where = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths)]
    longest = max(new for _, new in sizes)
    return q, k_pages, v_pages, Batch(*where, longest, table.to(device)), torch.cat(outputs)
