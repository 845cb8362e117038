"""The kernel for pages beside the ring's and beside whole sequences: the paper's shapes, random keys."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import measure
from fibattn import Pattern, attend, attend_cached
from fibattn.attention.paged import Batch, attend_paged

PATTERNS = {
    "stagger, first layer": Pattern.fibonacci(12, 0.5),
    "stagger, last layer": Pattern.fibonacci(12, 1.5),
    "window of 128 and rungs": Pattern.fibonacci(128),
    "bounded full layer": Pattern(1023),
}
_HEADS, _KV_HEADS, _SIZE = 8, 2, 64

Row = dict[str, Any]


def rows(requests: int, longest: int, page: int, chunk: int, device: str) -> Iterator[Row]:
    """Microseconds of a call for every pattern: a step from pages and from rings, a chunk from pages and by itself."""
    torch.manual_seed(0)
    lengths = torch.randint(1, longest + 1, (requests,))
    for name, pattern in PATTERNS.items():
        with torch.no_grad():
            steps = _steps(pattern, lengths, page, device)
            yield {
                "pattern": name,
                "requests": requests,
                **steps,
                **_chunks(pattern, longest, page, chunk // 4, device),
            }


def _steps(pattern: Pattern, lengths: Tensor, page: int, device: str) -> Row:
    options, requests = _options(device), len(lengths)
    q = torch.randn(requests, _HEADS, _SIZE, **options)
    k, v, batch = mix(lengths, torch.ones_like(lengths), page, options)
    given = [torch.randn(requests, rows, _KV_HEADS, _SIZE, **options) for rows in (*(pattern.reach + 1,) * 2, 1, 1)]
    at = (lengths[:, None] - 1).to(device)
    paged = measure(lambda: attend_paged(q, k, v, pattern, batch), device)
    ring = measure(lambda: attend_cached(q[:, None], *given, pattern, cache_positions=at), device)  # pyright: ignore
    return {"paged": paged.median, "ring": ring.median}


def _chunks(pattern: Pattern, before: int, page: int, tokens: int, device: str) -> Row:
    options, new = _options(device), torch.full((4,), tokens)
    q = torch.randn(4, tokens, _HEADS, _SIZE, **options)
    k, v, batch = mix(new + before, new, page, options)
    keys, values = (torch.randn(4, tokens + pattern.reach, _KV_HEADS, _SIZE, **options) for _ in range(2))
    chunk = measure(lambda: attend_paged(q.flatten(0, 1), k, v, pattern, batch), device)
    by_itself = measure(lambda: attend(q, keys, values, pattern), device)
    return {"chunk": chunk.median, "chunk_by_itself": by_itself.median}


def _options(device: str) -> dict[str, Any]:
    return {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}


def mix(lengths: Tensor, new: Tensor, page: int, options: dict[str, Any]) -> tuple[Tensor, Tensor, Batch]:
    """Pages in vLLM's layout, shuffled, of requests with so many tokens and so many new ones."""
    counts = -(-lengths // page)
    pages = torch.randn(int(counts.sum()), _KV_HEADS, page, 2 * _SIZE, **options).transpose(1, 2)
    order = torch.randperm(len(pages), dtype=torch.int32)
    table = torch.zeros(len(lengths), int(counts.max()), dtype=torch.int32)
    for one, own in enumerate(order.split(counts.tolist())):
        table[one, : len(own)] = own
    starts = torch.cat([new.new_zeros(1), new.cumsum(0)])
    starts, lengths, table = (x.to(options["device"], torch.int32) for x in (starts, lengths, table))
    return pages[..., :_SIZE], pages[..., _SIZE:], Batch(starts, lengths, int(new.max()), table)


def line_of(row: Row) -> str:
    """A row in words."""
    step = f"a step of {row['requests']} {row['paged']:.1f} µs from pages, {row['ring']:.1f} from rings"
    times = f"{row['paged'] / row['ring']:.2f} times"
    return f"{row['pattern']}: {step} ({times}); a chunk {row['chunk']:.1f} µs, by itself {row['chunk_by_itself']:.1f}"
