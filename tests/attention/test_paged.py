"""Attention from pages on the CPU, against the reference for every request by itself."""

from typing import Any

import pytest
import torch
from paged_requests import MIX, STEPS, requests

from fibattn.attention.paged import Batch, attend_paged, store_paged
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern

PATTERNS: list[tuple[Any, float | None]] = [
    (Pattern(3, (5, 8, 13, 34)), None),
    (Pattern(17), None),
    ((Pattern(3, (5, 8, 13, 21)), Pattern(3, (4, 9))), None),
    (LearnedPattern(3, (1, 2, 3, 5, 8, 13)), 1.23),
    (LearnedPattern(3, (1, 2, 3, 5, 8, 13), largest_alpha=0.6), 1.23),
]


@pytest.mark.parametrize("sizes", [MIX, STEPS])
@pytest.mark.parametrize(("pattern", "alpha"), PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_request_has_what_it_would_have_alone(sizes: Any, pattern: Any, alpha: Any, backend: Any) -> None:
    alpha = None if alpha is None else torch.tensor(alpha)
    q, k, v, batch, expected = requests(sizes, pattern, alpha=alpha)
    found = attend_paged(q, k, v, pattern, batch, alpha=alpha, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_keys_one_request_after_the_other() -> None:
    pattern = Pattern(3, (5, 8))
    q, k, v, batch, expected = requests(MIX, pattern, rows=64)
    assert batch.table is not None
    held = [slice(max(0, length - new - 8), length) for length, new in MIX]
    keys, values = (
        torch.cat([x[page, own] for page, own in zip(batch.table[:, 0], held, strict=True)]) for x in (k, v)
    )
    lengths = torch.tensor([own.stop - own.start for own in held], dtype=torch.int32)
    row = Batch(batch.starts, lengths, batch.longest, first=(lengths.cumsum(0) - lengths).int())
    found = attend_paged(q, keys[None], values[None], pattern, row)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_new_tokens_go_where_their_slots_say() -> None:
    k, v = torch.randn(2, 3, 2, 16)
    pages = torch.zeros(2, 4, 8, 2, 16)
    store_paged(k, v, *pages, torch.tensor([17, -1, 8]))
    assert torch.equal(pages[0, 2, 1], k[0])
    assert torch.equal(pages[1, 1, 0], v[2])
    assert pages.count_nonzero() == 4 * 32


def test_pages_of_another_model_are_refused() -> None:
    q, k, v, batch, _ = requests(MIX, Pattern(3))
    with pytest.raises(InputError, match=r"expected \(tokens, query heads, head size\) and \(pages"):
        attend_paged(q[..., :8], k, v, Pattern(3), batch)
