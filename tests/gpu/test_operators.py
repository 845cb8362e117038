"""The operators on a GPU: bitwise repeats, PyTorch's checks, compilation, no waiting, refusals. `pytest tests/gpu`"""

import importlib

import pytest
import torch
from comparison import FIBONACCI, RUNGS, tensors, with_gradients

from fibattn.attention import attend, ops
from fibattn.errors import InputError
from fibattn.pattern import LearnedPattern, Pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
    pytest.mark.usefixtures("poisoned_memory"),
]

LEARNED = LearnedPattern(12, RUNGS)


@pytest.mark.parametrize("learned", [False, True])
def test_the_backward_repeats_bit_for_bit(learned):
    inputs = tensors(4, 1024, 8, 2, 64)
    if learned:
        inputs.append(torch.tensor(1.03, device="cuda"))

    def function(q, k, v, alpha=None):
        return attend(q, k, v, LEARNED if learned else FIBONACCI, alpha=alpha, return_lse=True)

    first, upstream = with_gradients(function, inputs)
    for _ in range(30):
        again, _ = with_gradients(function, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(learned):
    q, k, v = tensors(2, 40, 4, 2, 64, torch.float32)
    alpha = torch.tensor(1.1, device="cuda") if learned else None
    offsets = [1, 8, 21] if learned else [9, 30]
    rest = (alpha, None, 0.125, 5, offsets, [len(offsets)], ops.NO_LIMIT)
    forward, backward = torch.ops.fibattn.attend_forward.default, torch.ops.fibattn.attend_backward.default
    torch.library.opcheck(forward, (q, k, v, *rest))
    out, lse = forward(q, k, v, *rest)
    torch.library.opcheck(backward, (torch.randn_like(out), None, out, lse, q, k, v, *rest))


@pytest.mark.parametrize("learned", [False, True])
def test_twenty_lengths_compile_twice_at_most(learned):
    kernels = [
        getattr(importlib.import_module(f"fibattn.attention.triton.{room}"), name)
        for room, name in (
            ("forward", "forward_kernel"),
            ("backward", "query_grad_kernel"),
            ("key_gradients", "rung_grad_kernel"),
            ("key_gradients", "window_grad_kernel"),
        )
    ]
    caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in kernels]
    before = [len(cache) for cache in caches]
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def function(q, k, v, alpha):
        return attend(q, k, v, LEARNED, alpha=alpha) if learned else attend(q, k, v, FIBONACCI)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counting, fullgraph=True)
    alpha = torch.tensor(1.1, device="cuda", requires_grad=True)
    for tokens in (1, 2, 3, 16, 31, 64, 100, 128, 129, 200, 255, 256, 257, 333, 400, 512, 600, 777, 1000, 1024):
        # A shape of its own (9 heads of 72), so that binaries of other tests do not count. Batches of one apart:
        # PyTorch compiles those by themselves, whatever the operator.
        inputs = [x.requires_grad_() for x in tensors(2 + tokens % 2, tokens, 9, 3, 72)]
        out = compiled(*inputs, alpha)
        out.sum().backward()
        assert torch.equal(out, function(*inputs, alpha))
    assert graphs <= 2
    assert all(len(cache) - n <= 2 for cache, n in zip(caches, before, strict=True))


def test_compiled_by_inductor():
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, FIBONACCI).float().square().sum(), fullgraph=True)
    inputs = [x.requires_grad_() for x in tensors(2, 200, 8, 2, 64)]
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    right = torch.autograd.grad(attend(*inputs, FIBONACCI).float().square().sum(), inputs)
    for mine, exact in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, exact)


def test_nothing_waits_for_the_gpu():
    inputs = [x.requires_grad_() for x in tensors(2, 200, 8, 2, 64)]
    ends = torch.tensor([0, 50, 400], device="cuda")
    alpha = torch.tensor(1.1, device="cuda", requires_grad=True)
    packed = [x.detach().reshape(1, 400, *x.shape[2:]).requires_grad_() for x in inputs]

    def work():
        attend(*inputs, FIBONACCI).sum().backward()
        attend(*packed, FIBONACCI, cu_seqlens=ends).sum().backward()
        attend(*inputs, LEARNED, alpha=alpha).sum().backward()

    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unsupported_input_is_refused():
    for dtype, size, message in (
        (torch.float64, 64, "float64"),
        (torch.float32, 20, "20"),
        (torch.float32, 264, "264"),
    ):
        q = torch.randn(1, 4, 2, size, dtype=dtype, device="cuda")
        with pytest.raises(InputError, match=message):
            attend(q, q, q, Pattern(2))
    q = torch.randn(1, 4, 2, 64, device="cuda")
    with pytest.raises(InputError, match="cpu"):
        attend(q, q.cpu(), q, Pattern(2))
    with pytest.raises(InputError, match="'cpu' runs on the CPU"):
        attend(q, q, q, Pattern(2), backend="cpu")
