"""Transformers' continuous batching: the tokens are those of `generate()`, and a bounded request's cache is bounded."""

import inspect
from typing import Any

import foreign_decoders
import pytest
import tiny_models
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from fibattn import InputError, convert, restore

PAGE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
PROMPTS = [
    torch.randint(2, 61, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 5, 23, 64, 65, 150, 700, 2, 31)
]


def batched(model: PreTrainedModel, prompts: list[list[int]], new: int = 8, **how: Any) -> list[list[int]]:
    """Answers to all, eight at once, in chunks of 64 tokens."""
    sizes = {PAGE: 32, "num_blocks": 200, "max_batch_tokens": 64, "max_requests_per_batch": 8, **how}
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(**sizes)
    found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=batching)
    assert [one.error for one in found.values()] == [None] * len(prompts)
    return [list(one.generated_tokens) for one in found.values()]


def alone(model: PreTrainedModel, prompt: list[int], new: int = 8) -> list[int]:
    ids = torch.tensor([prompt])
    how: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **how)  # pyright: ignore
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "kind", ["linear", "learned", "full", "mixture", "learned mixture", "bounded mixture", "modern"]
)
def test_batched_requests_have_the_tokens_of_generate(kind: str) -> None:
    made = tiny_models.model(kind)
    assert batched(made, PROMPTS) == [alone(made, one) for one in PROMPTS]


def test_heads_with_offsets_of_their_own() -> None:
    made = tiny_models.model("coprime", stagger_heads=True)
    assert batched(made, PROMPTS[3:7]) == [alone(made, one) for one in PROMPTS[3:7]]


@pytest.mark.parametrize("changes", [{"window": 2}, {"layer_types": ["sliding_attention"] * 4}])
def test_another_pattern_would_be_noticed(changes: dict[str, Any]) -> None:
    made, other = tiny_models.model(), tiny_models.model(**changes)
    other.load_state_dict(made.state_dict())
    prompts = PROMPTS[3:]
    assert all(a != alone(made, b) for a, b in zip(batched(other, prompts), prompts, strict=True))


@pytest.mark.parametrize("keep", [[], [1, 3]])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_converted_models_have_the_tokens_of_generate(architecture: str, keep: list[int]) -> None:
    made = convert(foreign_decoders.model(architecture), **foreign_decoders.PATTERN, keep_layers=keep)
    before = [alone(made, one) for one in PROMPTS[:7]]
    assert batched(made, PROMPTS[:7]) == before
    assert alone(made, PROMPTS[3]) == before[3]


def test_a_restored_model_batches_as_its_own() -> None:
    made = restore(convert(foreign_decoders.model(), **foreign_decoders.PATTERN))
    assert batched(made, PROMPTS[:5]) == [alone(made, one) for one in PROMPTS[:5]]


def test_a_bounded_request_fits_into_a_cache_much_shorter_than_its_text() -> None:
    made = tiny_models.model("bounded mixture")
    assert batched(made, PROMPTS[:1], new=200, num_blocks=3) == [alone(made, PROMPTS[0], new=200)]
    with pytest.raises(AssertionError):
        batched(tiny_models.model("full"), PROMPTS[:1], new=200, num_blocks=3)


def test_a_manager_that_stays() -> None:
    made = tiny_models.model()
    how = {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)}
    sizes = ContinuousBatchingConfig(num_blocks=20, max_batch_tokens=64)
    for _ in range(2):
        found = made.generate_batch(PROMPTS[:3], continuous_batching_config=sizes, persistent_manager=True, **how)
        assert [list(one.generated_tokens) for one in found.values()] == [alone(made, one, 5) for one in PROMPTS[:3]]
    made.destroy_cached_continuous_batching_manager()


def test_a_request_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="a request has no tokens; a prompt has at least one"):
        batched(tiny_models.model(), [[1, 2], []])
