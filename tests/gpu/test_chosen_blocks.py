"""Blocks that queries choose, on a GPU. `pytest tests/gpu`"""

import pytest
import torch
from comparison import with_gradients

from fibattn.attention import attend_chosen, attend_chosen_cached
from fibattn.pattern import ChosenPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def inputs(tokens, keys, heads, kv_heads, size, dtype):
    shapes = ((tokens, heads), (keys, kv_heads), (keys, kv_heads), (tokens, heads), (keys, kv_heads))
    return [torch.randn(2, n, h, size, device="cuda").to(dtype) for n, h in shapes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "keys", "heads", "kv_heads", "size", "pattern"),
    [
        (1500, 1500, 8, 2, 64, ChosenPattern()),
        (333, 1400, 8, 2, 64, ChosenPattern(100, blocks=6)),
        (700, 700, 7, 1, 40, ChosenPattern(0, blocks=2, block=32, reach=600)),
        (600, 600, 2, 2, 128, ChosenPattern(17, block=64, reach=500)),
        (300, 300, 32, 1, 64, ChosenPattern()),
        (1, 1, 8, 2, 64, ChosenPattern()),
        (900, 900, 8, 2, 64, ChosenPattern(anchored=True)),
    ],
)
def test_float32_against_the_reference(tokens, keys, heads, kv_heads, size, pattern, packed):
    given = [*inputs(tokens, keys, heads, kv_heads, size, torch.float32), torch.rand(kv_heads, device="cuda")]
    positions = torch.arange(keys, device="cuda")[None, -tokens:] % 700 if packed else None

    def function(q, k, v, far_q, far_k, trust, backend):
        return attend_chosen(q, k, v, pattern, far=(far_q, far_k), trust=trust, positions=positions, backend=backend)

    right, upstream = with_gradients(lambda *x: function(*x, "reference"), given)
    ours, _ = with_gradients(lambda *x: function(*x, "triton"), given, upstream)
    for mine, exact in zip(ours, right, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - exact).norm() <= 1e-4 * (exact.norm() + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_where_every_block_is_chosen(dtype):
    # With as many as there are, rounding does not change the choice.
    given, pattern = inputs(500, 500, 8, 2, 64, dtype), ChosenPattern(31, blocks=32)

    def function(q, k, v, far_q, far_k, backend):
        return attend_chosen(q, k, v, pattern, far=(far_q, far_k), backend=backend)

    right, upstream = with_gradients(lambda *x: function(*x, "reference"), given)
    ours, _ = with_gradients(lambda *x: function(*x, "triton"), given, upstream)
    for mine, exact in zip(ours, right, strict=True):
        assert (mine.double() - exact.double()).norm() <= 2e-2 * exact.double().norm()


@pytest.mark.parametrize("place", [5, 900, 5000])
@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        (torch.float32, ChosenPattern()),
        (torch.float32, ChosenPattern(100, blocks=2, block=64, reach=1023, anchored=True)),
        (torch.bfloat16, ChosenPattern(blocks=64)),  # all of them: a rounding would choose others
    ],
)
def test_a_step(dtype, pattern, place):
    q, k, v, far_q, far_k = inputs(1, 1, 8, 2, 64, dtype)
    rings = [torch.randn(2, 1024, 2, 64, device="cuda").to(dtype) for _ in range(3)]
    trust, at = torch.rand(2, device="cuda"), torch.tensor([[place]], device="cuda")

    def step(move):
        given, own = [move(x) for x in (q, k, v, far_q, far_k)], tuple(move(x) for x in rings)
        how = {
            "far": (given[3], given[4]),
            "trust": trust.to(given[0].device),
            "cache_positions": at.to(given[0].device),
        }
        with torch.no_grad():
            return attend_chosen_cached(given[0], own, given[1], given[2], pattern, **how), own

    (ours, mine), (right, theirs) = step(torch.clone), step(lambda x: x.cpu().double())
    error = (ours.cpu().double() - right).norm()
    assert error <= (1e-5 if dtype == torch.float32 else 2e-2) * right.norm()
    assert all(torch.equal(one.cpu().double(), other) for one, other in zip(mine, theirs, strict=True))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        again, _ = step(lambda x: x)
    captured.replay()
    assert torch.equal(again, ours)


def test_compiled():
    given = inputs(300, 300, 8, 2, 64, torch.float32)

    def function(q, k, v, far_q, far_k):
        return attend_chosen(q, k, v, ChosenPattern(), far=(far_q, far_k))

    plain, upstream = with_gradients(function, given)
    compiled, _ = with_gradients(torch.compile(function, fullgraph=True), given, upstream)
    for mine, exact in zip(compiled, plain, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)
