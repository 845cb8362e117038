"""Blocks that queries choose: the CPU against the reference, a text in pieces, what is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fibattn import ChosenPattern, InputError, Pattern, attend, attend_chosen
from fibattn.attention import attend_chosen_cached


def inputs(tokens: int, keys: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """q, k, v, far q, far k and trust."""
    draws = torch.Generator().manual_seed(0)
    counts = ((tokens, heads), (keys, kv_heads), (keys, kv_heads), (tokens, heads), (keys, kv_heads))
    made = [torch.randn(2, n, h, 8, dtype=torch.float64, generator=draws) for n, h in counts]
    return [*made, torch.rand(kv_heads, dtype=torch.float64, generator=draws)]


def results(pattern: ChosenPattern, given: list[Tensor], positions: Tensor | None, backend: str) -> list[Tensor]:
    """Output, log-sum-exp and every gradient."""
    q, k, v, far_q, far_k, trust = leaves = [x.clone().requires_grad_() for x in given]
    how = {"far": (far_q, far_k), "trust": trust, "positions": positions, "backend": backend}
    out, lse = attend_chosen(q, k, v, pattern, **how)  # pyright: ignore
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (out.cos().detach(), lse.sin().detach()))]


@pytest.mark.parametrize(
    ("tokens", "keys", "pattern", "padded"),
    [
        (300, 300, ChosenPattern(31, 3, 16, 127), False),
        (77, 500, ChosenPattern(5, 2, 16, 200), False),
        (290, 290, ChosenPattern(40, 2, 64, 250), True),
        (9, 9, ChosenPattern(), False),
        (290, 290, ChosenPattern(5, 1, 16, 250, anchored=True), True),
    ],
)
def test_the_cpu_is_the_reference(tokens: int, keys: int, pattern: ChosenPattern, padded: bool) -> None:
    positions = (torch.arange(keys) - torch.tensor([[0], [37]])).clamp(min=0) if padded else None
    given = inputs(tokens, keys)
    ours, right = (results(pattern, given, positions, backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours, right)


def test_every_block_in_reach_is_full_attention() -> None:
    q, k, v, *_ = inputs(200, 200)
    everything, trust = ChosenPattern(31, 64, 16, 1023), torch.zeros(2, dtype=torch.float64)
    out, lse = attend_chosen(q, k, v, everything, trust=trust)
    expected = attend(q, k, v, Pattern(199), return_lse=True)
    torch.testing.assert_close((out, lse), expected)


def test_a_choice_has_no_gradient_and_its_score_has() -> None:
    q, k, v, far_q, far_k, trust = inputs(100, 100)
    far_q.requires_grad_(), trust.requires_grad_()
    attend_chosen(q, k, v, ChosenPattern(5, 1), far=(far_q, far_k), trust=trust)[0].sum().backward()
    assert far_q.grad is not None
    assert far_q.grad[:, 40:].abs().min() > 0
    assert far_q.grad[:, :16].abs().max() == 0
    assert trust.grad is not None
    assert trust.grad.abs().min() > 0


def test_the_anchor_is_read_while_it_is_in_reach() -> None:
    q, k, v, *_ = inputs(200, 200)
    nothing, own = torch.zeros(2, dtype=torch.float64), torch.arange(200)
    for padding in (0, 21):
        positions = (own - padding).clamp(min=0)[None]
        how = {"trust": nothing, "positions": positions}
        out, _ = attend_chosen(q, k, v, ChosenPattern(20, 1, 16, 120, anchored=True), **how)  # pyright: ignore
        back = own[:, None] - own
        anchor = (own >= padding) & (own < padding + 16) & ((positions[0] > 20) & (positions[0] <= 120))[:, None]
        seen = (back >= 0) & (back <= positions[0][:, None]) & ((back <= 20) | anchor)
        keys, values = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
        right = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen)
        # Where there is no anchor, a query chooses freely.
        fixed = (positions[0] > 15) & (positions[0] <= 120) | (positions[0] < 16)
        torch.testing.assert_close(out[:, fixed], right.transpose(1, 2)[:, fixed])


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("padding", [0, 23])
def test_pieces_are_the_whole(padding: int, anchored: bool) -> None:
    pattern, (q, k, v, far_q, far_k, trust) = ChosenPattern(20, 2, 16, 100, anchored), inputs(300, 300)
    positions = (torch.arange(300) - padding).clamp(min=0)[None]
    right, _ = attend_chosen(q, k, v, pattern, far=(far_q, far_k), trust=trust, positions=positions)
    rings = tuple(torch.zeros(2, 101, 2, 8, dtype=torch.float64) for _ in range(3))
    found, ends = [], [0, 30, 31, 32, 80, 240, 299, 300]
    for begin, end in itertools.pairwise(ends):
        mine = slice(begin, end)
        how = {"far": (far_q[:, mine], far_k[:, mine]), "trust": trust, "positions": positions[:, mine]}
        at = torch.arange(begin, end)[None]
        found.append(
            attend_chosen_cached(q[:, mine], rings, k[:, mine], v[:, mine], pattern, cache_positions=at, **how)  # pyright: ignore
        )
    torch.testing.assert_close(torch.cat(found, dim=1)[:, padding:], right[:, padding:])


def test_rows_at_places_of_their_own_share_positions() -> None:
    pattern, (q, k, v, far_q, far_k, trust) = ChosenPattern(7, 2, 16, 63), inputs(1, 1)
    rings = tuple(torch.randn(2, 64, 2, 8, dtype=torch.float64) for _ in range(3))
    places, positions = torch.tensor([[70], [75]]), torch.tensor([[70]])

    def found(*rows: int) -> torch.Tensor:
        own = list(rows)
        given = [one[own].clone() for one in rings]
        how: dict[str, Any] = {"far": (far_q[own], far_k[own]), "trust": trust, "cache_positions": places[own]}
        return attend_chosen_cached(q[own], tuple(given), k[own], v[own], pattern, positions=positions, **how)

    torch.testing.assert_close(found(0, 1), torch.cat([found(0), found(1)]))


def test_rings_that_do_not_fit_are_refused() -> None:
    pattern, (q, k, v, far_q, far_k, _) = ChosenPattern(7, 2, 16, 63), inputs(1, 1)

    def refuses(message: str, rows: list[int], dtype: torch.dtype = torch.float64, **how: Any) -> None:
        rings = [torch.zeros(2, one, 2, 8, dtype=torch.float64) for one in rows]
        rings[-1] = rings[-1].to(dtype)
        with pytest.raises(InputError, match=message):
            attend_chosen_cached(q, tuple(rings), k, v, pattern, cache_positions=torch.tensor([[80]]), **how)

    refuses("there are 2 rings; give 3: of keys, of values, and with far of far keys", [64, 64], far=(far_q, far_k))
    refuses("there are 3 rings; give 2", [64, 64, 64])
    refuses("far_cache has 40 rows and k_cache 64; give as many", [64, 64, 40], far=(far_q, far_k))
    refuses("far_cache is torch.float32", [64, 64, 64], torch.float32, far=(far_q, far_k))


def test_autocast_casts_to_the_rings() -> None:
    pattern, (q, k, v, far_q, far_k, _) = ChosenPattern(7, 2, 16, 63), (x.float() for x in inputs(20, 20))
    rings = tuple(torch.zeros(2, 64, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        how: dict[str, Any] = {"far": (far_q, far_k), "cache_positions": torch.arange(20)[None]}
        found = attend_chosen_cached(q, rings, k, v, pattern, **how)
        right, _ = attend_chosen(q, k, v, pattern, far=(far_q, far_k))
    assert found.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("begins", [(0,), (0, 20, 143), (0, 100, 193)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_part_has_the_blocks_of_the_whole_row(backend: str, begins: tuple[int, ...], anchored: bool) -> None:
    pattern, (q, k, v, far_q, far_k, trust) = ChosenPattern(20, 1, 16, 64, anchored), inputs(240, 240)
    place = torch.arange(240)[None]
    positions = place - torch.stack([torch.where(place >= begin, begin, 0) for begin in begins]).amax(dim=0)
    first = (positions.argmax() - positions.max())[None, None]  # of the longest document
    given: dict = {"trust": trust, "backend": backend}
    right = attend_chosen(q, k, v, pattern, far=(far_q, far_k), positions=positions, **given)
    for begin, end in itertools.pairwise((0, 5, 112, 160, 240)):  # the reach before 112 is a block's first key
        mine, seen = slice(begin, end), slice(max(begin - 65, 0), end)
        how = {"far": (far_q[:, mine], far_k[:, seen]), "positions": positions[:, mine], **given}
        part = attend_chosen(q[:, mine], k[:, seen], v[:, seen], pattern, blocks_from=first - seen.start, **how)
        torch.testing.assert_close(part, (right[0][:, mine], right[1][..., mine]))


def test_what_is_wrong_is_said() -> None:
    q, k, v, far_q, far_k, trust = inputs(9, 9)
    with pytest.raises(InputError, match=r"pattern is Pattern\(.*expected a fibattn.ChosenPattern, or call attend"):
        attend_chosen(q, k, v, Pattern(3))  # pyright: ignore
    with pytest.raises(InputError, match=r"pattern is ChosenPattern\("):
        attend(q, k, v, ChosenPattern())  # pyright: ignore
    with pytest.raises(InputError, match=r"the far k is \(2, 9, 4, 8\) .*; expected it like k: \(2, 9, 2, 8\)"):
        attend_chosen(q, k, v, ChosenPattern(), far=(far_q, far_q))
    for wrong in (trust.repeat(2), trust.to("meta")):
        with pytest.raises(InputError, match=r"trust is .*64 on (cpu|meta); expected 2 floating-point numbers on cpu"):
            attend_chosen(q, k, v, ChosenPattern(), far=(far_q, far_k), trust=wrong)
    for wrong in (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"blocks_from is .*; expected \(batch or 1, 1\) torch.int64"):
            attend_chosen(q, k, v, ChosenPattern(), blocks_from=wrong)
    with pytest.raises(InputError, match=r"block is 24; blocks have 16, 32, 64 or 128 keys"):
        ChosenPattern(block=24)
