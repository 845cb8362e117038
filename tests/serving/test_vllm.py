"""The plugin: vLLM's tokens are those of `generate()`, and a bounded request holds its reach and a chunk, no more."""

from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import tiny_models
import torch
from engine import ask
from transformers import PreTrainedModel

from fibattn import FibAttnForCausalLM, convert

NEW = 24
_IDS = torch.randint(1, tiny_models.VOCABULARY, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
_SHARED = _IDS[:200]
PROMPTS = [
    *(_IDS[:1], _IDS[5:10], _IDS[100:164], _IDS[300:600], _IDS[1000:1700]),
    *(_SHARED + _IDS[900:930], _SHARED + _IDS[930:990], _SHARED + _IDS[900:930]),
]
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention on a CPU takes heads from 32 on."""


def saved(made: PreTrainedModel, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


def expected(made: Any) -> list[list[int]]:
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = [torch.tensor([one]) for one in PROMPTS]
    found = [made.generate(row, attention_mask=torch.ones_like(row), **how) for row in rows]
    return [one[0, row.shape[1] :].tolist() for one, row in zip(found, rows, strict=True)]


def most_blocks(window: int, chunk: int = 64, block: int = 32) -> int:
    """The reach before a chunk and the chunk, which may begin anywhere in a block."""
    return -(-(window - 1 + chunk) // block) + 1


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "stagger": ("linear", {}, {}),
    "stagger, prefixes": ("linear", {}, {"enable_prefix_caching": True}),
    "heads, small blocks, prefixes": (
        "coprime",
        {"stagger_heads": True},
        {"block_size": 16, "enable_prefix_caching": True},
    ),
    "learned, compiled": ("learned", {}, {"enforce_eager": False}),
    "bounded hybrid, long chunks": ("bounded mixture", {}, {"max_num_batched_tokens": 512}),
    "unbounded hybrid, prefixes": ("mixture", {}, {"enable_prefix_caching": True}),
    "ungated, with a skip": ("modern", {}, {"enforce_eager": False}),
    "every option": (
        "linear",
        {"qk_norm": True, "hidden_act": "gelu", "qkv_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_blocks(case: str, tmp_path: Path) -> None:
    kind, changes, how = CASES[case]
    made = tiny_models.model(kind, **SIZES, **changes)
    found = ask(saved(made, tmp_path / "model"), [PROMPTS, PROMPTS], NEW, **how)
    assert found["tokens"] == [expected(made)] * 2
    sizes = (how.get("max_num_batched_tokens", 64), how.get("block_size", 32))
    for group, window in enumerate(found["windows"]):
        assert window is None or found["held"][str(group)] <= most_blocks(window, *sizes)
    assert "layers are bounded: a request takes at most" in found["log"]
    if how.get("enable_prefix_caching"):
        assert found["cached"][1][4] >= 600
    else:
        assert found["free"] == -1, "all but vLLM's null block are free again"


@pytest.mark.parametrize("changes", [{"layer_types": ["sliding_attention"] * 4}, {"window": 2}])
def test_another_pattern_would_be_noticed(changes: dict[str, Any], tmp_path: Path) -> None:
    made, other = tiny_models.model(**SIZES), tiny_models.model(**SIZES, **changes)
    other.load_state_dict(made.state_dict())
    found = ask(saved(other, tmp_path / "model"), [PROMPTS], NEW)
    assert all(a != b for a, b in list(zip(found["tokens"][0], expected(made), strict=True))[2:])


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_converted_models(architecture: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 2048}
    made = convert(foreign_decoders.model(architecture, **sizes), **foreign_decoders.PATTERN, keep_layers=[2])
    found = ask(saved(made, tmp_path / "model"), [PROMPTS], NEW)
    assert found["tokens"] == [expected(made)]


def test_converted_models_of_other_architectures_are_refused(tmp_path: Path) -> None:
    made = convert(foreign_decoders.model("gemma", hidden_size=128, head_dim=32), **foreign_decoders.PATTERN)
    with pytest.raises(AssertionError, match="this is a converted gemma model"):
        ask(saved(made, tmp_path / "model"), [PROMPTS], NEW)


def test_two_ranks(tmp_path: Path) -> None:
    made = tiny_models.model("coprime", stagger_heads=True, **SIZES)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    found = ask(saved(made, tmp_path / "model"), [PROMPTS], NEW, environment, tensor_parallel_size=2)
    assert found["tokens"] == [expected(made)]


def test_half_precision_runs(tmp_path: Path) -> None:
    made: FibAttnForCausalLM = tiny_models.model("learned", **SIZES)
    found = ask(saved(made, tmp_path / "model"), [PROMPTS], NEW, dtype="bfloat16")
    assert [len(one) for one in found["tokens"][0]] == [NEW] * len(PROMPTS)


def test_a_quantised_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="kv_cache_dtype is 'fp8'; fibattn's layers take"):
        ask(saved(tiny_models.model(**SIZES), tmp_path / "model"), [PROMPTS], NEW, kv_cache_dtype="fp8")
