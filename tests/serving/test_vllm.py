"""The plugin: vLLM's tokens are those of `generate()`, and a bounded request holds its reach and a chunk, no more."""

import json
import os
from pathlib import Path
from typing import Any

import foreign_decoders
import pytest
import tiny_models
import torch
from engine import ask
from safetensors.torch import load_file, save_file
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
    "stagger, blocks of 8": ("linear", {}, {"block_size": 8}),
    "stagger, prefixes": ("linear", {}, {"enable_prefix_caching": True}),
    "heads, small blocks, prefixes": (
        "coprime",
        {"stagger_heads": True},
        {"block_size": 16, "enable_prefix_caching": True},
    ),
    "learned, compiled": ("learned", {}, {"enforce_eager": False}),
    "bounded hybrid, long chunks": ("bounded mixture", {}, {"max_num_batched_tokens": 512}),
    "bounded hybrid, compiled, prefixes": (
        "bounded mixture",
        {},
        {"enforce_eager": False, "enable_prefix_caching": True},
    ),
    "unbounded hybrid, prefixes": ("mixture", {}, {"enable_prefix_caching": True}),
    "learned hybrid": ("learned mixture", {}, {}),
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


@pytest.mark.parametrize(
    ("architecture", "full_reach"),
    [("llama", None), ("qwen3", 100), ("mistral", None), ("qwen2", None), ("smollm3", 100)],
)
def test_converted_models(architecture: str, full_reach: int | None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 2048}
    how: dict[str, Any] = {**foreign_decoders.PATTERN, "keep_layers": [2], "full_reach": full_reach}
    made = convert(foreign_decoders.model(architecture, **sizes), **how)
    found = ask(saved(made, tmp_path / "model"), [PROMPTS], NEW)
    assert found["tokens"] == [expected(made)]


def test_converted_models_of_other_architectures_are_refused(tmp_path: Path) -> None:
    made = convert(foreign_decoders.model("gemma", hidden_size=128, head_dim=32), **foreign_decoders.PATTERN)
    with pytest.raises(AssertionError, match="this is a converted gemma model"):
        ask(saved(made, tmp_path / "model"), [PROMPTS], NEW)


def test_long_texts_hold_their_reach_and_a_chunk(tmp_path: Path) -> None:
    """Eight requests, of `FIBATTN_LONG_TOKENS` tokens together."""
    new = int(os.environ.get("FIBATTN_LONG_TOKENS", "8000")) // 8
    folder = saved(tiny_models.model("bounded mixture", **SIZES), tmp_path / "model")
    found = ask(folder, [PROMPTS], new, max_model_len=new + 1024)
    print(f"{8 * new} tokens, most blocks of 32 by group: {found['held']}, windows {found['windows']}")
    assert [len(one) for one in found["tokens"][0]] == [new] * 8
    assert all(found["held"][str(group)] <= most_blocks(window) for group, window in enumerate(found["windows"]))
    assert found["free"] == -1


def test_two_ranks(tmp_path: Path) -> None:
    made = tiny_models.model("coprime", stagger_heads=True, value_embeddings=True, **SIZES)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    found = ask(saved(made, tmp_path / "model"), [PROMPTS], NEW, environment, tensor_parallel_size=2)
    assert found["tokens"] == [expected(made)]


def linears(made: Any) -> dict[str, torch.nn.Linear]:
    """The projections of the layers, which adapters and quantisation are for."""
    return {name: one for name, one in made.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"}


def has_avx512() -> bool:
    described = Path("/proc/cpuinfo")
    return described.exists() and " avx512f " in described.read_text()


@pytest.mark.parametrize("kind", ["bounded mixture", "modern"])
def test_adapters(kind: str, tmp_path: Path) -> None:
    """As peft saves one, in every projection; its tokens are those of the weights that it adds up to."""
    made = tiny_models.model(kind, **SIZES)
    folder, alone, weights = saved(made, tmp_path / "model"), expected(made), {}
    for name, one in linears(made).items():
        down, up = torch.randn(4, one.in_features) * 0.3, torch.randn(one.out_features, 4) * 0.3
        weights |= {f"base_model.model.{name}.lora_{half}.weight": x for half, x in (("A", down), ("B", up))}
        one.weight.data += 2 * up @ down
    save_file(weights, tmp_path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
    said["target_modules"] = sorted({name.rpartition(".")[2] for name in linears(made)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    found = ask(folder, [PROMPTS], NEW, adapter=str(tmp_path), enable_lora=True, max_lora_rank=8)
    assert found["tokens"] == [expected(made)]
    assert expected(made) != alone


@pytest.mark.skipif(not has_avx512(), reason="this processor has no AVX-512, without which other tokens come out")
def test_quantised_weights(tmp_path: Path) -> None:
    """Eight bits a weight and an activation, as compressed-tensors has them, beside the same rounding done by hand."""

    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
        return (x / step).round().clamp(-128, 127), step

    made = tiny_models.model("bounded mixture", **SIZES, intermediate_size=256)
    folder = saved(made, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    for name, one in linears(made).items():
        whole, step = rounded(one.weight.data)
        state |= {f"{name}.weight": whole.to(torch.int8), f"{name}.weight_scale": step}
        one.weight.data = whole * step
        one.register_forward_pre_hook(lambda _, given: (torch.mul(*rounded(given[0])),))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**how, "strategy": "channel", "dynamic": False},
        "input_activations": {**how, "strategy": "token", "dynamic": True},
    }
    quantised = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**quantised, "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))
    pairs = zip(ask(folder, [PROMPTS], NEW)["tokens"][0], expected(made), strict=True)
    same = sum(a == b for pair in pairs for a, b in zip(*pair, strict=True))
    # An activation in the middle between two steps may go either way. Without the rounding a third are the same.
    assert same > 0.75 * NEW * len(PROMPTS)


def test_half_precision_runs(tmp_path: Path) -> None:
    made: FibAttnForCausalLM = tiny_models.model("learned", **SIZES)
    found = ask(saved(made, tmp_path / "model"), [PROMPTS], NEW, dtype="bfloat16")
    assert [len(one) for one in found["tokens"][0]] == [NEW] * len(PROMPTS)


def test_embeddings_for_prompts_are_refused_where_ids_decide_values(tmp_path: Path) -> None:
    folder = saved(tiny_models.model("modern", **SIZES), tmp_path / "model")
    with pytest.raises(AssertionError, match="enable_prompt_embeds is True, but this model has value_embeddings"):
        ask(folder, [PROMPTS[:1]], 1, enable_prompt_embeds=True)


def test_a_quantised_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="kv_cache_dtype is 'fp8'; fibattn's layers take"):
        ask(saved(tiny_models.model(**SIZES), tmp_path / "model"), [PROMPTS], NEW, kv_cache_dtype="fp8")
