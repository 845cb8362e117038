"""Decoding on a GPU: the kernel's precision, CUDA graphs, compilation, flat memory. `pytest tests/gpu`

The kernel is judged against the CPU's step in float64 on inputs that were rounded first. The weights of the
values are rounded once and so is the output: the error may be two roundings of the largest value.
"""

import gc
import importlib

import pytest
import torch

from fibattn import FibAttnConfig, FibAttnForCausalLM
from fibattn.attention import attend, attend_cached
from fibattn.pattern import LearnedPattern, Pattern, base_rungs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
]

FIBONACCI = Pattern.fibonacci(window=12)
RUNGS = base_rungs("fibonacci")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def inputs(batch, heads, kv_heads, size, rows, dtype=torch.bfloat16, tokens=1):
    """q, the two rings, k and v on the GPU."""
    q = torch.randn(batch, tokens, heads, size, device="cuda").to(dtype)
    rings = [torch.randn(batch, rows, kv_heads, size, device="cuda").to(dtype) for _ in range(2)]
    return [q, *rings, *(torch.randn(batch, tokens, kv_heads, size, device="cuda").to(dtype) for _ in range(2))]


def check(call, given, **how):
    exact = [x.double().cpu() for x in given]
    right = call(*exact, **{name: None if x is None else x.cpu() for name, x in how.items()})
    ours = call(*given, **how)
    assert ours.dtype == given[0].dtype
    error = (ours.double().cpu() - right).abs().max()
    assert error <= 2 * torch.finfo(ours.dtype).eps * exact[2].abs().max() + 2e-5, error
    for ring, same in zip(given[1:3], exact[1:3], strict=True):
        assert torch.equal(ring.double().cpu(), same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(8, 2, 64), (32, 8, 128), (14, 2, 64), (1, 1, 40), (9, 3, 72), (4, 1, 256), (32, 1, 16)]
)
def test_shapes(shape, dtype):
    for first in (0, 5, 986, 987, 988, 1_048_576, 3_000_000_000):
        at = torch.tensor([[first], [first + 400], [first + 3]], device="cuda")
        check(lambda *x, **how: attend_cached(*x, FIBONACCI, **how), inputs(3, *shape, 988, dtype), cache_positions=at)


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("window", [0, 1, 31, 32, 63, 64, 128, 500, 990])
def test_windows(window, dtype):
    pattern = Pattern.fibonacci(window=window)
    at = torch.tensor([[70], [5000]], device="cuda")
    check(lambda *x, **how: attend_cached(*x, pattern, **how), inputs(2, 8, 2, 64, 1000, dtype), cache_positions=at)


def test_padding_and_a_pattern_for_each_head():
    patterns = [Pattern(12, (13, 40)), Pattern(12), Pattern(12, (20, 40, 60, 100, 200)), Pattern(12, (299,))]
    at, positions = torch.tensor([[5000]], device="cuda"), torch.tensor([[150], [0]], device="cuda", dtype=torch.int32)
    given = inputs(2, 8, 4, 64, 300)
    check(lambda *x, **how: attend_cached(*x, patterns, **how), given, cache_positions=at, positions=positions)


@pytest.mark.parametrize("tokens", [1, 7])
def test_rings_that_still_grow_and_such_that_are_too_small(tokens):
    first = torch.tensor([[0], [400 - tokens]], device="cuda")
    at = first + torch.arange(tokens, device="cuda")
    call = lambda *x, **how: attend_cached(*x, FIBONACCI, **how)  # noqa: E731
    check(call, inputs(2, 8, 2, 64, 400, tokens=tokens), cache_positions=at)
    lost = call(*inputs(2, 8, 2, 64, 377, tokens=tokens), cache_positions=at)
    assert lost.isnan().flatten(1).all(1).tolist() == [False, True]


def test_rings_laid_out_by_head():
    at = torch.tensor([[5000]], device="cuda")
    given = inputs(2, 8, 2, 64, 988)
    given[1:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[1:3]]
    check(lambda *x, **how: attend_cached(*x, FIBONACCI, **how), given, cache_positions=at)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.73, 1.0625, 1.4999])
@pytest.mark.parametrize("window", [0, 12])
def test_a_learned_alpha(alpha, window, dtype):
    pattern = LearnedPattern(window, RUNGS)

    def call(q, *rest, **how):
        return attend_cached(q, *rest, pattern, alpha=torch.tensor(alpha, device=q.device), **how)

    at, positions = torch.tensor([[3000], [400]], device="cuda"), torch.tensor([[89], [500]], device="cuda")
    check(call, inputs(2, 8, 2, 64, pattern.reach + 1, dtype), cache_positions=at)
    check(call, inputs(2, 8, 2, 64, pattern.reach + 1, dtype), cache_positions=at, positions=positions)


@pytest.mark.parametrize("learned", [False, True])
def test_a_graph_replayed_token_by_token_equals_the_whole(learned):
    tokens, alpha = 1200, torch.tensor([1.07], device="cuda") if learned else None
    pattern = LearnedPattern(12, RUNGS[:9], max_offset=109) if learned else Pattern.fibonacci(window=12, max_offset=110)
    q, _, _, k, v = inputs(2, 8, 2, 64, 1, torch.float32, tokens)
    rings = [torch.zeros(2, pattern.reach + 1, 2, 64, device="cuda") for _ in range(2)]
    new = [x[:, :1].clone() for x in (q, k, v)]
    at = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def step():
        return attend_cached(new[0], *rings, *new[1:], pattern, alpha=alpha, cache_positions=at)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    outs = []
    for token in range(tokens):
        for into, x in zip(new, (q, k, v), strict=True):
            into.copy_(x[:, token : token + 1])
        at.fill_(token)
        graph.replay()
        outs.append(out.clone())
    right = attend(q, k, v, pattern, alpha=alpha)
    torch.testing.assert_close(torch.cat(outs, 1), right, rtol=1e-4, atol=1e-5)


def test_contexts_and_batches_share_a_binary():
    kernel = importlib.import_module("fibattn.attention.triton.decode").decode_kernel
    cache = kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for batch, first, rows in ((1, 3, 988), (2, 4096, 1000), (3, 1_048_577, 988), (16, 2**40, 1024)):
        at = torch.full((1, 1), first, device="cuda")
        given = inputs(batch, 9, 3, 80, rows)
        attend_cached(*given, FIBONACCI, cache_positions=at)
    assert len(cache) - before <= 2


KINDS = {
    "sparse": {},
    "learned": {"schedule": "learned"},
    "hybrid": {"layer_types": ["fibonacci_attention", "full_attention", "sliding_attention", "fibonacci_attention"]},
    "bounded hybrid": {
        "layer_types": ["fibonacci_attention", "full_attention", "sliding_attention", "full_attention"],
        "full_reach": 100,
    },
}


def model(kind):
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    made = FibAttnForCausalLM(FibAttnConfig(**shape, **heads, rungs=9, initializer_range=0.2, **KINDS[kind]))
    return made.cuda().eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_takes_the_most_likely_tokens(kind, padded):
    torch._dynamo.reset()
    m = model(kind)
    ids = torch.randint(1, 512, (3, 40), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :13] = 0
    how = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cached in ({}, {"cache_implementation": "static"}):
        out = m.generate(ids, attention_mask=mask, **how, **cached)
        seen = torch.nn.functional.pad(mask, (0, 150), value=1)
        places = (seen.cumsum(1) - 1).clamp(min=0)
        logits = m(out, attention_mask=seen, position_ids=places, use_cache=False).logits[:, 39:-1]
        # Where two tokens are as good as equal, another order of additions may choose the other.
        chosen = logits.gather(2, out[:, 40:, None])[..., 0]
        assert (logits.max(-1).values - chosen).max() < 5e-3
    assert out.shape == (3, 190)


@pytest.mark.parametrize("kind", ["sparse", "learned"])
def test_a_long_stream_keeps_its_memory(kind):
    from transformers import StaticCache

    m = model(kind)
    cache = StaticCache(config=m.config, max_cache_len=1)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")

    def step():
        token.copy_(m(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    gc.collect()  # else what other tests left is given back between the two
    allocated = []
    for _ in range(2):
        for _ in range(5000):
            graph.replay()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[0] == allocated[1]
    assert int(cache.get_seq_length()) == 10003
