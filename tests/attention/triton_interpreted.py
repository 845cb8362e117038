"""Checks of the kernels' logic against the reference, in Triton's interpreter; run by `test_triton.py`.

Small shapes in float32 (and one in float16: the interpreter's bfloat16 is broken in Triton 3.6). Precision,
races and speed are the business of `tests/gpu`.
"""

import inspect
from functools import cache

import pytest
import torch
import triton.runtime.interpreter as interpreter
from paged_requests import MIX, STEPS, requests
from triton.language.core import is_builtin

from fibattn.attention import api, attend, attend_cached, attend_chosen, attend_chosen_cached
from fibattn.attention.paged import Batch, attend_paged, store_paged
from fibattn.errors import InputError
from fibattn.pattern import ChosenPattern, LearnedPattern, Pattern

_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor, scope):
    # NumPy 2.4 no longer turns arrays of one element into integers, which Triton 3.6 does for loop bounds.
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


@cache
def _builtins(package):
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package, builder, scope):
    # As Triton's own, which looks through all that a package has whenever a function is called: a quarter of the time.
    for name in _builtins(package):
        member = getattr(package, name)
        if is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_lang_tensor = _patch_index
interpreter._patch_builtin = _patch_builtin


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill memory that nobody wrote with NaN, so that an element a kernel forgot shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


RUNGS = (1, 2, 3, 5, 8, 13, 21, 34)
DOCUMENTS = torch.cat([torch.arange(31), torch.arange(8)])[None]


def results(function, backend, inputs):
    """Output, log-sum-exp and every gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs, return_lse=True, backend=backend)
    torch.manual_seed(1)
    upstream = (torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape))
    return [out, lse, *torch.autograd.grad((out, lse), inputs, upstream)]


def agree(function, inputs, tolerance=2e-6):
    for ours, right in zip(results(function, "triton", inputs), results(function, "reference", inputs), strict=True):
        assert ours.shape == right.shape
        assert ours.dtype == right.dtype
        assert torch.isfinite(ours).all()
        error = (ours.double() - right.double()).norm()
        assert error <= tolerance * (right.double().norm() + 1)


def tensors(batch, tokens, keys, heads, kv_heads, size, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((tokens, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, t, h, size).to(dtype) for t, h in shapes]


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "kv_heads", "size"),
    [
        (2, 39, 39, 4, 2, 16),
        (1, 1, 1, 4, 1, 16),
        (1, 6, 45, 2, 2, 24),
        (1, 37, 37, 7, 1, 40),
        (1, 33, 40, 8, 1, 16),
    ],
)
def test_attend(batch, tokens, keys, heads, kv_heads, size):
    pattern = Pattern(5, (7, 13, 21, 34, 10**12))
    agree(lambda q, k, v, **how: attend(q, k, v, pattern, **how), tensors(batch, tokens, keys, heads, kv_heads, size))


@pytest.mark.parametrize("pattern", [Pattern(0), Pattern(3, (4,)), Pattern(37), Pattern(50, (60,))])
def test_windows(pattern):
    agree(lambda q, k, v, **how: attend(q, k, v, pattern, **how), tensors(1, 38, 38, 4, 2, 16))


def test_a_dense_window_ends_within_the_text():
    """Too wide for columns: its edge is a mask of its own."""
    pattern = Pattern(66, (69,))
    agree(lambda q, k, v, **how: attend(q, k, v, pattern, **how), tensors(1, 71, 71, 2, 1, 16))


def test_a_pattern_for_each_head():
    patterns = [Pattern(3, (7, 13, 21, 34)), Pattern(3, (4, 30))]
    agree(lambda q, k, v, **how: attend(q, k, v, patterns, **how), tensors(1, 39, 39, 4, 2, 16))


def test_packed_documents():
    pattern = Pattern(5, (7, 13, 21, 34))
    agree(lambda q, k, v, **how: attend(q, k, v, pattern, positions=DOCUMENTS, **how), tensors(2, 39, 39, 4, 2, 16))


@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(39, 4, 2), (39, 2, 2), (23, 16, 1)])
def test_half_precision(tokens, heads, kv_heads):
    """Wider tiles of columns than float32 has; batches of 8, 16 and one query."""
    pattern = Pattern(5, (7, 13, 21))
    inputs = tensors(1, tokens, tokens, heads, kv_heads, 16, torch.float16)
    agree(lambda q, k, v, **how: attend(q, k, v, pattern, **how), inputs, tolerance=2e-3)


def test_strided_views():
    packed = torch.randn(2, 39, 8, 16)
    views = [packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:]]
    ours = attend(*views, Pattern(3, (7, 20)), backend="triton")
    copies = attend(*(x.contiguous() for x in views), Pattern(3, (7, 20)), backend="triton")
    assert torch.equal(ours, copies)


def test_gradients_of_strided_views():
    packed = torch.randn(2, 30, 8, 16)
    views = [packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:]]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]

    def function(q, k, v, **how):
        return attend(q, k, v, Pattern(3, (7, 20)), **how)

    leaves = [x.detach().requires_grad_() for x in heads_first]
    torch.manual_seed(1)
    upstream = torch.randn(2, 4, 30, 16).transpose(1, 2)
    ours = torch.autograd.grad(function(*leaves, backend="triton"), leaves, upstream)
    right = torch.autograd.grad(function(*leaves, backend="reference"), leaves, upstream)
    assert not any(x.is_contiguous() for x in (*leaves, upstream))
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, exact, rtol=2e-5, atol=2e-6)


def test_inputs_with_one_dominant_key_and_large_values():
    q, k, v = tensors(1, 39, 39, 4, 2, 16)
    k[:, ::9] *= 12
    agree(lambda q, k, v, **how: attend(q, k, v, Pattern(5, (7, 13, 21)), **how), [4 * q, k, 100 * v], tolerance=1e-5)


def test_a_token_changes_the_rows_that_attend_to_it_and_no_others():
    pattern, token = Pattern(3, (7, 13, 21)), 11
    q, k, v = tensors(1, 39, 39, 4, 2, 16)
    before = attend(q, k, v, pattern, backend="triton")
    k[:, token] += 1
    v[:, token] -= 1
    changed = (attend(q, k, v, pattern, backend="triton") != before).flatten(2).any(-1)[0]
    assert set(changed.nonzero()[:, 0].tolist()) == {token + d for d in pattern.distances}


def test_packed_documents_equal_documents_on_their_own():
    pattern = Pattern(5, (7, 13, 21))
    q, k, v = tensors(1, 39, 39, 4, 2, 16)
    packed = attend(q, k, v, pattern, cu_seqlens=torch.tensor([0, 31, 39]), backend="triton")
    alone = [attend(q[:, s], k[:, s], v[:, s], pattern, backend="triton") for s in (slice(31), slice(31, 39))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


# 1.3125 * 8 = 10.5 and 1.1875 * 8 = 9.5 round to even; 0.5 puts 1 and 2, 3 … between the same keys.
@pytest.mark.parametrize(
    ("alpha", "packed"),
    [(1.0, False), (1.07, False), (0.5, False), (1.3125, False), (1.1875, False), (1.0, True), (1.07, True)],
)
def test_a_learned_alpha(alpha, packed):
    positions, pattern = DOCUMENTS if packed else None, LearnedPattern(3, RUNGS, max_offset=40)

    def moved(q, k, v, alpha, **how):
        return attend(q, k, v, pattern, alpha=alpha, positions=positions, **how)

    agree(moved, [*tensors(1, 39, 39, 4, 2, 16), torch.tensor(alpha)])


@pytest.mark.parametrize("rungs", [(), (1, 2, 3)], ids=["none", "all inside the window"])
def test_a_learned_alpha_without_a_rung_left(rungs):
    inputs, pattern = [*tensors(1, 39, 39, 4, 2, 16), torch.tensor(1.1)], LearnedPattern(5, rungs)
    agree(lambda q, k, v, alpha, **how: attend(q, k, v, pattern, alpha=alpha, **how), inputs)


@pytest.mark.parametrize("window", [3, 70])
def test_a_learned_alpha_in_half_precision(window):
    """Rungs in 16 bits, beside columns and beside a dense window."""
    inputs, pattern = [*tensors(1, 39, 39, 4, 2, 16, torch.float16), torch.tensor(0.83)], LearnedPattern(window, RUNGS)
    agree(lambda q, k, v, alpha, **how: attend(q, k, v, pattern, alpha=alpha, **how), inputs, tolerance=2e-3)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_alpha_gives_no_plausible_numbers(alpha):
    q, k, v = tensors(1, 39, 39, 4, 2, 16)
    out = attend(q, k, v, LearnedPattern(3, RUNGS), alpha=torch.tensor(alpha), backend="triton")
    assert out.isnan().any()


def decode_agrees(call, inputs, rows, first, tokens=9, positions=None, tolerance=2e-6):
    """The kernel and the CPU's step give the same outputs and leave the same rings, token after token."""
    q, k, v = inputs
    rings = torch.randn(2, k.shape[0], rows, *k.shape[2:]).to(k.dtype)
    ours, theirs = rings.clone(), rings.clone()
    for token in range(tokens):
        new = [x[:, token : token + 1] for x in (q, k, v)]
        how = {
            "cache_positions": first + token,
            "positions": None if positions is None else (positions + token).clamp(min=0),
        }
        a = call(new[0], *ours, *new[1:], backend="triton", **how)
        b = call(new[0], *theirs, *new[1:], backend="cpu", **how)
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
        assert torch.equal(ours, theirs)


FIRST = torch.tensor([[1], [40]])


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (7, 1, 40), (2, 2, 24), (32, 1, 16)])
def test_decode(heads, kv_heads, size):
    pattern = Pattern(5, (7, 13, 21))
    inputs = tensors(2, 9, 9, heads, kv_heads, size)
    decode_agrees(lambda *x, **how: attend_cached(*x, pattern, **how), inputs, 22, FIRST)


def test_decode_from_rings_that_still_grow():
    inputs, first, alpha = tensors(2, 9, 9, 4, 2, 16), torch.tensor([[0], [1]]), torch.tensor(1.3125)
    decode_agrees(lambda *x, **how: attend_cached(*x, Pattern(5, (7, 13, 21)), **how), inputs, 10, first)
    moved = lambda *x, **how: attend_cached(*x, LearnedPattern(3, RUNGS[:6]), alpha=alpha, **how)  # noqa: E731
    decode_agrees(moved, inputs, 10, first)


@pytest.mark.parametrize("pattern", [Pattern(0), Pattern(40, (70,)), [Pattern(3, (7, 9, 13)), Pattern(3, (4, 30))]])
def test_decode_windows_and_heads(pattern):
    inputs = tensors(2, 9, 9, 4, 2, 16)
    decode_agrees(lambda *x, **how: attend_cached(*x, pattern, **how), inputs, 75, FIRST)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "dtype"), [(4, 2, 16, None), (7, 1, 24, torch.float16)])
def test_decode_of_a_wide_window_by_several_programs(heads, kv_heads, size, dtype):
    pattern, first = Pattern(299, (340, 419)), torch.tensor([[0], [700]])
    inputs = tensors(2, 3, 3, heads, kv_heads, size, dtype or torch.float32)
    call = lambda *x, **how: attend_cached(*x, pattern, **how)  # noqa: E731
    how = {"tokens": 3, "tolerance": 2e-6 if dtype is None else 2e-3}
    decode_agrees(call, inputs, 420, first, **how)
    decode_agrees(call, inputs, 420, first, positions=torch.tensor([[-1], [200]]), **how)


def test_decode_with_padding_and_half_precision():
    pattern = Pattern(5, (7, 13, 21))
    inputs = tensors(2, 9, 9, 4, 2, 16, torch.float16)
    call = lambda *x, **how: attend_cached(*x, pattern, **how)  # noqa: E731
    decode_agrees(call, inputs, 25, FIRST, positions=torch.tensor([[-4], [10]]), tolerance=2e-3)


@pytest.mark.parametrize(("window", "alpha"), [(0, 1.0), (0, 0.6), (3, 0.6), (3, 1.3125)])
def test_decode_with_a_learned_alpha(alpha, window):
    pattern, alpha = LearnedPattern(window, RUNGS[:6]), torch.tensor(alpha)

    def call(*x, **how):
        return attend_cached(*x, pattern, alpha=alpha, **how)

    decode_agrees(call, tensors(2, 9, 9, 4, 2, 16), pattern.reach + 1, FIRST)
    decode_agrees(call, tensors(2, 9, 9, 4, 2, 16), pattern.reach + 1, FIRST + 30, positions=torch.tensor([[-2], [5]]))


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_alpha_that_reaches_beyond_the_ring_gives_no_plausible_numbers(monkeypatch, tokens):
    monkeypatch.setattr(api, "readable", lambda _: False)  # as on a GPU
    q, k, v = tensors(2, tokens, tokens, 4, 2, 16)
    pattern, at = LearnedPattern(3, RUNGS, largest_alpha=0.6), FIRST + 60 + torch.arange(tokens)
    how = {"alpha": torch.tensor(1.4), "cache_positions": at, "backend": "triton"}
    assert attend_cached(q, *torch.randn(2, 2, 22, 2, 16), k, v, pattern, **how).isnan().all()


def test_decode_beyond_the_ring_gives_no_plausible_numbers():
    q, k, v = tensors(2, 1, 1, 4, 2, 16)
    rings = torch.randn(2, 2, 22, 2, 16)
    # Where positions can be read, as here, too few rows are refused; the kernel alone shows what a GPU does.
    step = (q, *rings, k, v, FIRST, None, None, 0.25, 3, [7, 22], [2], 99, True)
    assert torch.ops.fibattn.attend_step(*step).isnan().flatten(1).all(1).tolist() == [False, True]


def test_unsupported_input_is_refused():
    for dtype, size, message in (
        (torch.float64, 16, "float64"),
        (torch.float32, 20, "20"),
        (torch.float32, 264, "264"),
    ):
        q = torch.randn(1, 4, 2, size, dtype=dtype)
        with pytest.raises(InputError, match=message):
            attend(q, q, q, Pattern(2), backend="triton")


@pytest.mark.parametrize("sizes", [MIX, STEPS])
@pytest.mark.parametrize(
    ("pattern", "alpha", "group"),
    [
        (Pattern(3, (5, 8, 13, 34)), None, 2),
        (Pattern(70, (80,)), None, 3),
        (Pattern(130), None, 4),
        ((Pattern(3, (5, 8, 13, 21)), Pattern(3, (4, 9))), None, 4),
        (LearnedPattern(3, (1, 2, 3, 5, 8, 13)), 1.23, 2),
    ],
)
def test_pages(sizes, pattern, alpha, group):
    alpha = None if alpha is None else torch.tensor(alpha)
    q, k, v, batch, expected = requests(sizes, pattern, alpha=alpha, group=group, size=24)
    found = attend_paged(q, k, v, pattern, batch, alpha=alpha, backend="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tokens_of_no_request_come_out_as_zeros():
    q, k, v, batch, expected = requests(MIX, Pattern(3, (5, 8)))
    q = torch.cat([q, torch.full_like(q[:9], torch.nan)])
    found = attend_paged(q, k, v, Pattern(3, (5, 8)), batch, backend="triton")
    torch.testing.assert_close(found[:-9], expected, rtol=1e-5, atol=1e-5)
    assert found[-9:].count_nonzero() == 0


def test_keys_in_one_row():
    q, k, v, batch, expected = requests(((30, 7), (20, 20)), Pattern(3, (5, 8, 29)), rows=32)
    rows = [x[batch.table[:, 0]] for x in (k, v)]
    keys, values = (torch.cat([x[0, :30], x[1, :20]]) for x in rows)
    lengths, first = torch.tensor([[30, 20], [0, 30]], dtype=torch.int32)
    row = Batch(batch.starts, lengths, 20, first=first)
    found = attend_paged(q, keys[None], values[None], Pattern(3, (5, 8, 29)), row, backend="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_storing_in_pages():
    k, v = torch.randn(2, 5, 2, 24)
    slots = torch.tensor([17, -1, 8, 0, 31])
    pages = torch.zeros(2, 2, 4, 2, 8, 24).transpose(3, 4)
    store_paged(k, v, *pages[0], slots)
    store_paged(k, v, *pages[1], slots, backend="triton")
    assert torch.equal(*pages)


@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "kv_heads", "size", "pattern", "starts"),
    [
        (60, 60, 4, 2, 16, ChosenPattern(17, blocks=1, reach=60), None),
        (21, 100, 3, 1, 24, ChosenPattern(5, blocks=2, reach=80), None),
        (90, 90, 1, 1, 16, ChosenPattern(0, blocks=1, block=32, reach=90), ((0, 40), (7, 7))),  # packed, padded
        (5, 5, 2, 1, 16, ChosenPattern(), None),
        (21, 100, 3, 1, 24, ChosenPattern(5, blocks=2, reach=99, anchored=True), None),
        (90, 90, 1, 1, 16, ChosenPattern(0, blocks=1, reach=90, anchored=True), ((0, 40), (7, 7))),
    ],
)
def test_chosen_blocks(tokens, keys, heads, kv_heads, size, pattern, starts):
    inputs = tensors(2, tokens, keys, heads, kv_heads, size)
    inputs += [x.flip(-1) * 0.7 for x in inputs[:2]] + [torch.linspace(0.5, 1.5, kv_heads)]
    positions = None
    if starts is not None:
        index, starts = torch.arange(keys), torch.tensor(starts)
        positions = (index - torch.where(index < starts[:, 1:], starts[:, :1], starts[:, 1:])).clamp(min=0)

    def function(q, k, v, far_q, far_k, trust, return_lse, backend):
        how = {"far": (far_q, far_k), "trust": trust, "positions": positions, "backend": backend}
        return attend_chosen(q, k, v, pattern, **how)

    agree(function, inputs)


def test_a_part_has_the_blocks_of_the_whole_row():
    pattern, place = ChosenPattern(5, blocks=1, reach=48), torch.arange(120)[None]
    q, k, v = tensors(2, 120, 120, 4, 2, 16)
    positions = torch.where(place < 50, place, place - 50)
    right = attend_chosen(q, k, v, pattern, positions=positions, backend="cpu")
    for mine, seen in ((slice(0, 40), slice(0, 40)), (slice(97, 120), slice(48, 120))):
        first = torch.tensor([[50 - seen.start]])
        how = {"positions": positions[:, mine], "blocks_from": first, "backend": "triton"}
        part = attend_chosen(q[:, mine], k[:, seen], v[:, seen], pattern, **how)
        torch.testing.assert_close(part[0], right[0][:, mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[1], right[1][..., mine], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "size", "kv_heads", "has_far", "padding"),
    [
        (ChosenPattern(5, blocks=2, reach=70), 24, 2, True, 0),
        (ChosenPattern(20, blocks=1, block=32, reach=70), 16, 1, False, 3),
        (ChosenPattern(0, blocks=3, reach=70, anchored=True), 16, 1, True, 19),
    ],
)
def test_a_step_that_chooses_blocks(pattern, size, kv_heads, has_far, padding):
    tokens = 100
    q, k, v = tensors(2, tokens, tokens, 4, kv_heads, size)
    far = (q.flip(-1) * 0.7, k.flip(-1) * 0.7) if has_far else None
    trust = torch.linspace(0.5, 1.5, kv_heads) if has_far else None
    place = torch.arange(tokens)[None]
    positions = (place - torch.tensor([[0], [padding]])).clamp(min=0) if padding else None
    rings = [torch.zeros(2, 71, kv_heads, size) for _ in range(3 if has_far else 2)]
    numbers = (size**-0.5, pattern.window, pattern.reach, pattern.block, pattern.blocks, pattern.anchored)
    for now in range(tokens):
        mine, before = slice(now, now + 1), [ring.clone() for ring in rings]
        of = {"far": None if far is None else (far[0][:, mine], far[1][:, mine]), "trust": trust}
        at = None if positions is None else positions[:, mine]
        new = (k[:, mine], v[:, mine])
        how = {**of, "cache_positions": place[:, mine], "positions": at}
        right = attend_chosen_cached(q[:, mine], tuple(rings), *new, pattern, **how)
        if now not in (0, 1, 16, 38, 39, 70, 71, 98, 99):
            continue
        caches = (*before, None)[:3]
        given = (*new, *(of["far"] or (None, None)), trust, place[:, mine], at, *numbers)
        found = torch.ops.fibattn.attend_chosen_step(q[:, mine], *caches, *given)
        assert all(torch.equal(mine, ring) for mine, ring in zip(before, rings, strict=True))
        real = slice(None) if now >= padding else slice(0, 1)
        torch.testing.assert_close(found[real], right[real], rtol=1e-5, atol=1e-5)
