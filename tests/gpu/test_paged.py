"""Attention from pages on a GPU: precision, the ring's outputs, CUDA graphs, continuous batching. `pytest tests/gpu`"""

from typing import Any

import pytest
import tiny_models
import torch
from paged_requests import MIX, STEPS, requests
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from fibattn.attention import attend_cached
from fibattn.attention.paged import Batch, attend_paged, store_paged
from fibattn.pattern import LearnedPattern, Pattern, base_rungs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU (torch.cuda.is_available() is false)"),
]

LONG = ((3000, 1), (1500, 700), (800, 800), (0, 0), (2, 1), (1025, 1024))
PATTERNS: list[tuple[Any, float | None]] = [
    (Pattern.fibonacci(12), None),
    (Pattern.fibonacci(128, 1.5), None),
    (Pattern(1023), None),
    ((Pattern(3, (5, 8, 13, 21)), Pattern(3, (4, 9))), None),
    (LearnedPattern(12, base_rungs("fibonacci")), 1.23),
]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("sizes", [MIX, STEPS, LONG, [(length, 1) for length in range(1, 3000, 50)]])
@pytest.mark.parametrize(("pattern", "alpha"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_request_has_what_it_would_have_alone(sizes, pattern, alpha, dtype):
    alpha = None if alpha is None else torch.tensor(alpha, device="cuda")
    shape = {"group": 4, "size": 64, "rows": 16}
    q, k, v, batch, expected = requests(sizes, pattern, alpha=alpha, dtype=dtype, device="cuda", **shape)
    found = attend_paged(q, k, v, pattern, batch, alpha=alpha)
    # The values' weights are rounded once, and so is the output; values go up to about five.
    bound = 10 * torch.finfo(dtype).eps + 2e-5
    assert (found.float() - expected.float()).abs().max() <= bound


def test_the_ring_has_the_same_outputs():
    pattern, lengths = Pattern.fibonacci(12), torch.randint(1, 5000, (64,))
    sizes = [(int(length), 1) for length in lengths]
    q, k, v, batch, _ = requests(sizes, pattern, group=4, size=64, rows=16, dtype=torch.bfloat16, device="cuda")
    rings = torch.zeros(2, 64, pattern.reach + 1, 2, 64, device="cuda", dtype=torch.bfloat16)
    new = torch.empty(2, 64, 1, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert batch.table is not None
    for one, length in enumerate(lengths.tolist()):
        held = torch.arange(max(0, length - 1 - pattern.reach), length, device="cuda")
        page = batch.table[one, held // 16].long()
        for index, pages in enumerate((k, v)):
            rings[index, one, held % (pattern.reach + 1)] = pages[page, held % 16]
            new[index, one, 0] = pages[page[-1], held[-1] % 16]
    at = (lengths[:, None] - 1).cuda()
    ring = attend_cached(q[:, None], *rings, *new, pattern, cache_positions=at)[:, 0]
    torch.testing.assert_close(attend_paged(q, k, v, pattern, batch), ring, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sizes", [STEPS, MIX])
def test_a_captured_graph_serves_another_mix(sizes):
    """Same shapes, other lengths and pages: what an engine replays."""
    pattern = Pattern.fibonacci(3, rungs=8)
    given = [requests(s, pattern, size=64, device="cuda") for s in (sizes, list(reversed(sizes)))]
    q, k, v, batch, _ = given[0]
    assert batch.table is not None
    out = torch.zeros_like(q)
    longest = max(batch.longest, given[1][3].longest)
    held = Batch(batch.starts, batch.lengths, longest, batch.table)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attend_paged(q, k, v, pattern, held, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_paged(q, k, v, pattern, held, out=out)
    other_q, other_k, other_v, other, expected = given[1]
    for mine, new in ((q, other_q), (k, other_k), (v, other_v), (batch.starts, other.starts)):
        mine.copy_(new)
    batch.lengths.copy_(other.lengths)
    batch.table.copy_(other.table)  # pyright: ignore
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_new_tokens_go_where_their_slots_say():
    k, v = torch.randn(2, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(512, device="cuda")[:300]
    slots[::7] = -1
    pages = torch.zeros(2, 2, 32, 2, 16, 64, device="cuda", dtype=torch.bfloat16).transpose(3, 4)
    store_paged(k, v, *pages[0], slots)
    host = [x.cpu() for x in pages[1]]
    store_paged(k.cpu(), v.cpu(), *host, slots.cpu())
    assert all(torch.equal(ours.cpu(), right) for ours, right in zip(pages[0], host, strict=True))


@pytest.mark.parametrize("kind", ["linear", "learned", "bounded mixture", "mixture"])
def test_batched_requests_have_the_tokens_of_generate(kind: str):
    """Bounded models run as CUDA graphs here, which Transformers captures."""
    check_batch(kind)


def test_buffers_are_cleared_before_they_are_filled(monkeypatch: pytest.MonkeyPatch):
    """However late the GPU is with what was to be done before."""
    start = ContinuousBatchingManager.start

    def start_late(manager: ContinuousBatchingManager) -> None:
        torch.cuda._sleep(2_000_000_000)
        start(manager)

    monkeypatch.setattr(ContinuousBatchingManager, "start", start_late)
    check_batch("linear")


def check_batch(kind: str) -> None:
    made = tiny_models.model(kind, hidden_size=128, head_dim=32).cuda()
    prompts = [tiny_models.tokens(1, length, seed=length)[0].tolist() for length in (1, 5, 64, 150, 700)]
    greedy = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=200, max_batch_tokens=128, max_requests_per_batch=8)
    found = made.generate_batch(prompts, generation_config=greedy, continuous_batching_config=sizes)
    how: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for one, prompt in zip(found.values(), prompts, strict=True):
        row = torch.tensor([prompt], device="cuda")
        alone = made.generate(row, attention_mask=torch.ones_like(row), **how)
        assert one.error is None
        assert list(one.generated_tokens) == alone[0, len(prompt) :].tolist()
