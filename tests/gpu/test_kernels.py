"""The kernels on a GPU: precision and properties with fixed offsets, from poisoned memory. `pytest tests/gpu`"""

from functools import partial

import pytest
import torch
from comparison import DTYPES, FIBONACCI, check, tensors, with_gradients

from fibattn.attention import attend
from fibattn.pattern import Pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 40, 64, 96, 128, 256])
def test_head_sizes(size, dtype):
    check(tensors(2, 300, 8, 2, size, dtype), Pattern(12, (13, 21, 34, 55, 89, 144, 233)))


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (8, 2), (8, 1), (7, 1), (14, 2), (32, 1)])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_groups(heads, dtype):
    check(tensors(2, 129, *heads, 64, dtype), Pattern(12, (13, 21, 34, 55, 89)))


@pytest.mark.parametrize("tokens", [1, 2, 11, 12, 13, 14, 127, 128, 129, 986, 987, 988, 989, 1100])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_lengths(tokens, dtype):
    check(tensors(2, tokens, 8, 2, 64, dtype), FIBONACCI)


@pytest.mark.parametrize("kind", ["random", "peaked", "correlated", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_of_input(kind, dtype):
    check(tensors(3, 700, 8, 2, 64, dtype, kind=kind), FIBONACCI)
    check(tensors(2, 300, 8, 2, 128, dtype, kind=kind), Pattern.fibonacci(window=40))


@pytest.mark.parametrize("window", [0, 1, 15, 16, 17, 31, 32, 33, 128, 500, 3000])
def test_windows(window):
    check(tensors(2, 600, 8, 2, 64), Pattern.fibonacci(window=window))


@pytest.mark.parametrize(("size", "heads"), [(128, (2, 2)), (128, (4, 2)), (256, (2, 2)), (64, (32, 1))])
def test_wide_windows_of_other_groups(size, heads):
    check(tensors(2, 300, *heads, size), Pattern.fibonacci(window=100))


def test_many_rungs():
    check(tensors(2, 300, 4, 2, 64), Pattern(2, tuple(range(4, 200, 3))))


@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
def test_fewer_queries_than_keys(tokens):
    check(tensors(2, tokens, 8, 2, 64, keys=260), Pattern(12, (13, 40, 129, 250)))


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_a_pattern_for_each_head(dtype):
    patterns = [Pattern(12, (13, 40)), Pattern(12), Pattern(12, (20, 40, 60, 100, 200)), Pattern(12, (299,))]
    check(tensors(2, 300, 8, 4, 64, dtype), patterns)


@pytest.mark.parametrize("scale", [0.0, 0.5, -0.1])
def test_scale(scale):
    check(tensors(2, 100, 4, 2, 64), Pattern(5, (9, 30)), scale=scale)


def test_positions():
    documents = torch.cat([torch.arange(n) for n in (1, 100, 17, 182)])[None].cuda()
    check(tensors(2, 300, 8, 2, 64), Pattern(12, (13, 40, 90)), positions=documents)
    padded = torch.stack([torch.arange(300), (torch.arange(300) - 60).clamp(min=0)]).cuda()
    check(tensors(2, 300, 8, 2, 64), Pattern(12, (13, 40, 90)), positions=padded)


def test_a_window_of_everything_is_dense_attention():
    q, k, v = tensors(2, 200, 8, 2, 64, torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, Pattern(199)).double(), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_a_token_changes_only_the_rows_that_attend_to_it(dtype):
    q, k, v = tensors(2, 400, 8, 2, 64, dtype)
    before = attend(q, k, v, FIBONACCI)
    for token in (0, 100, 250, 399):
        k2, v2 = k.clone(), v.clone()
        k2[:, token] += 1
        v2[:, token] -= 1
        changed = (attend(q, k2, v2, FIBONACCI) != before).flatten(2).any(-1).any(0)
        assert set(changed.nonzero()[:, 0].tolist()) == {token + d for d in FIBONACCI.distances if token + d < 400}


def test_the_future_changes_nothing():
    q, k, v = tensors(2, 400, 8, 2, 64)
    half = [x[:, :200] for x in (q, k, v)]
    assert torch.equal(attend(q, k, v, FIBONACCI)[:, :200], attend(*half, FIBONACCI))


def test_packed_equals_separate():
    lengths = [64, 128, 16, 192]
    q, k, v = tensors(1, sum(lengths), 8, 2, 64)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda", dtype=torch.int32)
    packed = attend(q, k, v, FIBONACCI, cu_seqlens=ends)
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = attend(*(x[:, first:last] for x in (q, k, v)), FIBONACCI)
        assert torch.equal(packed[:, first:last], alone)


def test_a_batch_entry_does_not_see_the_others():
    inputs = tensors(3, 200, 8, 2, 64)
    together = attend(*inputs, FIBONACCI)
    for i in range(3):
        assert torch.equal(together[i : i + 1], attend(*(x[i : i + 1] for x in inputs), FIBONACCI))


def test_offsets_beyond_the_length_do_nothing():
    inputs = tensors(2, 200, 8, 2, 64)
    beyond = Pattern(12, (*FIBONACCI.offsets[:8], 2000, 10**6, 10**12))
    (ours, _), (right, _) = (
        with_gradients(partial(attend, pattern=one, return_lse=True), inputs) for one in (beyond, FIBONACCI)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_strided_views_equal_copies():
    packed = torch.randn(2, 300, 12, 64, device="cuda", dtype=torch.bfloat16)
    views = [packed[:, :, :8], packed[:, :, 8:10], packed[:, :, 10:]]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    copies = [x.contiguous() for x in views]
    right, upstream = with_gradients(partial(attend, pattern=FIBONACCI, return_lse=True), copies)
    for inputs in (views, heads_first):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, FIBONACCI, return_lse=True)
        ours = [out, lse, *torch.autograd.grad((out, lse), leaves, upstream)]
        assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_expanded_gradients():
    q, k, v = (x.requires_grad_() for x in tensors(1, 50, 4, 2, 64, torch.float32))
    ours = torch.autograd.grad(attend(q, k, v, FIBONACCI).sum(), (q, k, v))
    right = torch.autograd.grad(attend(q, k, v, FIBONACCI, backend="reference").sum(), (q, k, v))
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_strides_past_32_bits():
    """Rows so far apart that element offsets need 64 bits."""
    tokens, stride = 40, 2**26 + 64
    buffer = torch.empty(tokens * stride, device="cuda", dtype=torch.bfloat16)
    views = [
        buffer.as_strided((1, tokens, h, 64), (tokens * stride, stride, 64, 1), s)
        for h, s in ((4, 0), (2, 256), (2, 384))
    ]
    for view in views:
        view.copy_(torch.randn(view.shape, device="cuda"))
    ours, upstream = with_views(views)
    right, _ = with_gradients(partial(attend, pattern=Pattern(5, (9, 30)), return_lse=True), views, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def with_views(views):
    leaves = [x.detach().requires_grad_() for x in views]
    out, lse = attend(*leaves, Pattern(5, (9, 30)), return_lse=True)
    upstream = [torch.randn_like(out), torch.randn_like(lse)]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, upstream)], upstream
