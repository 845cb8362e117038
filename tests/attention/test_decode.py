"""Attention from a ring: any chunks of a sequence, then single tokens, equal one call over the whole.

`chunked` gives the operator a sequence in pieces; whatever the pieces, wherever the ring wraps, the outputs
must be those of `attend` on the whole sequence.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fibattn.attention import api, attend, attend_cached
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern

RUNGS = (1, 2, 3, 5, 8, 13)
PATTERN = Pattern(3, (5, 8, 11))


def tensors(batch=2, tokens=40, heads=4, kv_heads=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, tokens, h, size, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def rings(k, rows):
    return [torch.zeros(k.shape[0], rows, *k.shape[2:], dtype=k.dtype) for _ in range(2)]


def pieces(lengths, tokens):
    """Slices of these lengths, then of one token each."""
    ends = list(itertools.accumulate(lengths))
    ends = [end for end in ends if end < tokens]
    ends += range((ends or [0])[-1] + 1, tokens + 1)
    return [slice(a, b) for a, b in itertools.pairwise([0, *ends])]


def chunked(q, k, v, lengths, call, rows, positions=None, growing=False):
    """Rings have `rows`; growing ones as few as there are tokens, and `rows` in the end."""
    caches = rings(k, 0 if growing else rows)
    outs = []
    for some in pieces(lengths, q.shape[1]):
        more = min(rows, some.stop) - caches[0].shape[1]
        caches = [functional.pad(x, (0, 0, 0, 0, 0, max(more, 0))) for x in caches]
        given = None if positions is None else positions[:, some]
        at = torch.arange(some.start, some.stop)[None]
        outs.append(call(q[:, some], *caches, k[:, some], v[:, some], cache_positions=at, positions=given))
    return torch.cat(outs, 1)


def fixed(*inputs, **how):
    return attend_cached(*inputs, PATTERN, **how)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=5), st.integers(0, 5))
def test_any_chunks_equal_the_whole(lengths, spare):
    q, k, v = tensors()
    ours = chunked(q, k, v, lengths, fixed, PATTERN.reach + 1 + spare)
    torch.testing.assert_close(ours, attend(q, k, v, PATTERN), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=5))
def test_rings_may_grow_with_the_sequence(lengths):
    q, k, v = tensors()
    ours = chunked(q, k, v, lengths, fixed, PATTERN.reach + 1, growing=True)
    torch.testing.assert_close(ours, attend(q, k, v, PATTERN), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefill", range(1, 2 * (PATTERN.reach + 1) + 2))
def test_every_remainder_around_the_wrap(prefill):
    q, k, v = tensors()
    ours = chunked(q, k, v, [prefill], fixed, PATTERN.reach + 1)
    torch.testing.assert_close(ours, attend(q, k, v, PATTERN), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.97, 1.0, 1.3125, 1.4999])
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("lengths", [[], [7, 1, 20], [29, 2]])
def test_a_learned_scale(alpha, window, lengths):
    q, k, v = tensors()
    alpha, pattern = torch.tensor(alpha), LearnedPattern(window, RUNGS, max_offset=15)

    def moved(*inputs, **how):
        return attend_cached(*inputs, pattern, alpha=alpha, **how)

    right = attend(q, k, v, pattern, alpha=alpha)
    for growing in (False, True):
        ours = chunked(q, k, v, lengths, moved, pattern.reach + 1, growing=growing)
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[], [9, 9, 9], [33]])
def test_left_padding(lengths):
    q, k, v = tensors()
    padding = torch.tensor([[0], [13]])
    positions = (torch.arange(40)[None] - padding).clamp(min=0)
    right = attend(q, k, v, PATTERN, positions=positions)
    ours = chunked(q, k, v, lengths, fixed, PATTERN.reach + 1, positions)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    alone = attend(q[1:, 13:], k[1:, 13:], v[1:, 13:], PATTERN)
    torch.testing.assert_close(ours[1:, 13:], alone, rtol=0, atol=1e-12)


def test_sequences_of_different_age_share_a_batch():
    q, k, v = tensors(tokens=41)
    first = torch.tensor([[25], [7]])
    caches = rings(k, PATTERN.reach + 1)
    for row in range(2):
        some = slice(0, int(first[row]))
        at = torch.arange(some.stop)[None]
        mine = [x[row : row + 1] for x in caches]
        attend_cached(*(x[row : row + 1, some] for x in (q,)), *mine, k[row : row + 1, some], v[row : row + 1, some],
                      PATTERN, cache_positions=at)  # fmt: skip
    for chunk in (1, 3, 1):
        at = first + torch.arange(chunk)
        new = [torch.stack([x[row, at[row]] for row in range(2)]) for x in (q, k, v)]
        ours = attend_cached(new[0], *caches, *new[1:], PATTERN, cache_positions=at)
        right = attend(q, k, v, PATTERN)
        torch.testing.assert_close(ours, torch.stack([right[row, at[row]] for row in range(2)]), rtol=0, atol=1e-12)
        first = first + chunk


def test_a_pattern_for_each_head():
    q, k, v = tensors()
    patterns = (Pattern(3, (5, 11)), Pattern(3, (4, 6, 7, 12)))

    def call(*inputs, **how):
        return attend_cached(*inputs, patterns, **how)

    ours = chunked(q, k, v, [6], call, 13)
    torch.testing.assert_close(ours, attend(q, k, v, patterns), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = tensors(dtype=dtype)
    ours = chunked(q, k, v, [9], fixed, PATTERN.reach + 1)
    assert ours.dtype == dtype
    right = attend(*(x.double() for x in (q, k, v)), PATTERN)
    torch.testing.assert_close(ours.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_ring_may_be_a_view_and_holds_the_last_tokens():
    q, k, v = tensors()
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in rings(k, 12)]
    at = torch.arange(30)[None]
    attend_cached(q[:, :30], *heads_first, k[:, :30], v[:, :30], PATTERN, cache_positions=at)
    attend_cached(q[:, 30:31], *heads_first, k[:, 30:31], v[:, 30:31], PATTERN, cache_positions=at[:, -1:] + 1)
    for position in range(19, 31):
        assert torch.equal(heads_first[0][:, position % 12], k[:, position])
        assert torch.equal(heads_first[1][:, position % 12], v[:, position])


def test_far_positions_do_not_matter():
    q, k, v = tensors()
    near, far = rings(k, 12), rings(k, 12)
    start = 3_000_000_000 // 12 * 12
    for token in range(40):
        some = slice(token, token + 1)
        at = torch.tensor([[token]])
        outs = [
            attend_cached(q[:, some], *ring, k[:, some], v[:, some], PATTERN, cache_positions=at + shift, positions=at)
            for ring, shift in ((near, 0), (far, start))
        ]
        assert torch.equal(*outs)


def test_gradients_reach_the_new_tokens():
    q, k, v = tensors(tokens=20)
    for some in (slice(19, 20), slice(12, 20)):
        caches = rings(k, 12)
        before = slice(0, some.start)
        at = torch.arange(20)[None]
        attend_cached(q[:, before], *caches, k[:, before], v[:, before], PATTERN, cache_positions=at[:, before])
        new = [x[:, some].clone().requires_grad_() for x in (q, k, v)]
        ours = attend_cached(new[0], *caches, *new[1:], PATTERN, cache_positions=at[:, some])
        whole = [torch.cat([x[:, before], y], 1) for x, y in zip((q, k, v), new, strict=True)]
        right = attend(*whole, PATTERN)[:, some]
        for a, b in zip(torch.autograd.grad(ours.sum(), new), torch.autograd.grad(right.sum(), new), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not caches[0].requires_grad


def test_the_operators_pass_torchs_checks():
    q, k, v = (x[:, :1] for x in tensors(dtype=torch.float32))
    at, positions = torch.tensor([[14]]), torch.tensor([[14], [4]])
    caches = [torch.randn(2, 12, 2, 8) for _ in range(2)]
    step, given = torch.ops.fibattn.attend_step, (q, *caches, k, v, at)
    torch.library.opcheck(step, (*given, None, positions, 0.3, 3, [5, 8, 11], [3], 99), {"interpret": False})
    torch.library.opcheck(step, (*given, torch.tensor(0.8), None, 0.3, 3, [1, 2, 3, 5, 8], [5], 10))


def test_compiles_whole_once_for_all_tokens():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(fixed, fullgraph=True, backend=backend)
    q, k, v = tensors(dtype=torch.float32)
    caches, outs = rings(k, 12), []
    with torch.no_grad():
        for token in range(40):
            some = slice(token, token + 1)
            new = [x[:, some].contiguous() for x in (q, k, v)]
            outs.append(step(new[0], *caches, *new[1:], cache_positions=torch.tensor([[token]])))
    torch.testing.assert_close(torch.cat(outs, 1), attend(q, k, v, PATTERN))
    assert len(graphs) == 1


def test_a_far_rung_of_a_learned_scale_is_refused(monkeypatch):
    q, k, v = (x[:, :1] for x in tensors())
    pattern, alpha = LearnedPattern(3, RUNGS, largest_alpha=0.8), torch.tensor(1.2)
    assert pattern.reach == 11
    for tokens in (1, 2):
        parts = [x[:, :1].expand(-1, tokens, -1, -1).contiguous() for x in (q, k, v)]
        at = torch.arange(30, 30 + tokens)[None]
        for backend in ("cpu", "reference"):
            given = (parts[0], *rings(k, 12), *parts[1:])
            with pytest.raises(InputError, match="the rings have 12 rows; a reach of 16 needs 17"):
                attend_cached(*given, pattern, alpha=alpha, cache_positions=at, backend=backend)
    monkeypatch.setattr(api, "readable", lambda _: False)  # as while compiling, when the operator looks itself
    with pytest.raises(InputError, match="the cache has 12 rows"):
        attend_cached(q, *rings(k, 12), k, v, pattern, alpha=alpha, cache_positions=torch.tensor([[30]]))
    with pytest.raises(InputError, match="alpha is nan"):
        attend_cached(parts[0], *rings(k, 12), *parts[1:], pattern, alpha=alpha, cache_positions=at)


@pytest.mark.parametrize("lengths", [[], [7, 1, 20]])
def test_a_learned_scale_beyond_the_largest_reads_what_a_longer_ring_has(lengths):
    q, k, v = tensors()
    pattern, alpha = LearnedPattern(3, RUNGS, largest_alpha=0.8), torch.tensor(1.2)

    def moved(*inputs, **how):
        return attend_cached(*inputs, pattern, alpha=alpha, **how)

    ours = chunked(q, k, v, lengths, moved, 17)
    torch.testing.assert_close(ours, attend(q, k, v, pattern, alpha=alpha), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 11, "at": [[9, 10, 11]]}, "11 rows; a reach of 11 needs 12, or one for each of the 12 tokens"),
        ({"rows": 2}, "2 rows; a reach of 11 needs 12, or one for each of the 3 tokens"),
        ({"rows": 0}, "k_cache has 0 rows .* at least 1"),
        ({"at": [[5, 4, 3]]}, r"\[\[5, 4, 3\]\]; they must go up by one"),
        ({"at": [[0, 0, 1]]}, "must go up by one"),
        ({"at": [[-1, 0, 1]]}, "go down to -1"),
        ({"at": [[0, 1]]}, r"cache_positions have shape \(1, 2\); expected \(2 or 1, 3\)"),
        ({"at": [[0.0, 1.0, 2.0]]}, "expected integers"),
        ({"kv_heads": 4}, "is it the cache of another model"),
        ({"dtype": torch.float32}, "k_cache is torch.float32"),
        ({"short": True}, "3 query tokens and 4 new keys"),
        ({"given": [0, 1, 2]}, "cache_positions are a list; give a tensor of integers on cpu"),
        ({"given": None}, "cache_positions are a NoneType; give a tensor of integers"),
    ],
)
def test_bad_input(change, message):
    q, k, v = (x[:, :3] for x in tensors())
    shape = (2, change.get("rows", 12), change.get("kv_heads", 2), 8)
    caches = [torch.zeros(shape, dtype=change.get("dtype", torch.float64)) for _ in range(2)]
    if "short" in change:
        k, v = (torch.cat([x, x[:, :1]], 1) for x in (k, v))
    at = change["given"] if "given" in change else torch.tensor(change.get("at", [[0, 1, 2]]))
    with pytest.raises(InputError, match=message):
        attend_cached(q, *caches, k, v, PATTERN, cache_positions=at)


def test_a_window_and_rungs_far_longer_than_any_text():
    q, k, v = (x.requires_grad_() for x in tensors())
    endless = Pattern(2**40, (2**50, 2**62))
    right, ours = attend(q, k, v, Pattern(39)), attend(q, k, v, endless)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, right)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():
        parts = chunked(q, k, v, [5, 1, 9], lambda *x, **how: attend_cached(*x, endless, **how), 2**40, growing=True)
    torch.testing.assert_close(parts, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [2**31, 2**32, 2**63 - 1])
def test_positions_of_more_than_32_bits_are_no_limit(place):
    q, k, v = tensors()
    ours = attend(q, k, v, PATTERN, positions=torch.full((1, 40), place))
    torch.testing.assert_close(ours, attend(q, k, v, PATTERN), rtol=0, atol=0)


def test_reach_of_a_learned_scale():
    for window, max_offset in itertools.product((0, 4, 30), (None, 0, 6, 100)):
        pattern = LearnedPattern(window, RUNGS, max_offset)
        for step in range(1, 151):
            assert max((rung.near + 1 for rung in pattern.at(step / 100)), default=window) <= pattern.reach
