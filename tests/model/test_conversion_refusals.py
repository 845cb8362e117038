"""What cannot be converted, or not be called so, is refused with the reason and left as it was."""

import re
from typing import Any

import pytest
import torch
from foreign_decoders import LAYERS, PATTERN, model, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import fibattn
from fibattn import InputError

REFUSED: dict[str, tuple[Any, str]] = {
    "softcapping": (lambda: model("gemma2"), "caps its attention logits at 50.0"),
    "latent attention": (
        lambda: model("deepseek_v3", first_k_dense_replace=4, n_group=1, topk_group=1, n_routed_experts=8),
        "multi-head latent attention",
    ),
    "looking ahead": (lambda: model("gemma3_text", use_bidirectional_attention=True), "looks ahead"),
    "dropout": (lambda: model(attention_dropout=0.1), "attention_dropout is 0.1"),
    "unknown": (lambda: model("gpt_neox"), "'gpt_neox'.*not among those known to work"),
    "encoder-decoder": (
        lambda: AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5", vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "sparse by itself": (
        lambda: fibattn.FibAttnForCausalLM(
            fibattn.FibAttnConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_attention_heads=2)
        ),
        "sparse by themselves",
    ),
    "quantised of our own": (
        lambda: model("fibattn", layer_types=["full_attention"] * LAYERS, quantization_config={"quant_method": "x"}),
        "this FibAttnForCausalLM is quantised, or of another class; convert it before that",
    ),
    "converted": (lambda: fibattn.convert(model(), **PATTERN), "converted already"),
    "wrapped": (lambda: nn.Sequential(model()), "a Sequential cannot be converted"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_models_that_cannot_be_converted(which: str) -> None:
    make, reason = REFUSED[which]
    with pytest.raises(InputError, match=reason):
        fibattn.convert(make(), **PATTERN)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"window": -1}, "window is -1"),
        ({"window": 3, "schedule": "learned"}, "fixed offsets"),
        ({"window": 3, "schedule": "spiral"}, "unknown schedule 'spiral'"),
        ({"window": 3, "base": "primes"}, "unknown base 'primes'"),
        ({"window": 3, "keep_layers": [0, 1, 2, 3]}, "every layer"),
        ({"window": 3, "keep_layers": [4]}, "from 0 to 3"),
        ({"window": 3, "keep_layers": [1, 1]}, "different indices"),
        ({"window": 3, "keep_layers": 0}, r"keep_layers is 0; give the layers as a list: \[0\]"),
        ({"window": 3, "keep_layers": "0"}, r"keep_layers is '0'; give the layers as a list: \[0\]"),
        ({"window": 3, "keep_layers": ["0"]}, r"a layer of keep_layers is '0'; it must be a whole number"),
        ({"window": "3"}, r"window is '3'; it must be a whole number"),
        (
            {"window": 3, "rungs": 2, "blocks": 1},
            r"rungs is 2 and blocks 1; beyond the window there are either rungs or blocks",
        ),
        (
            {"window": 3, "blocks": 1, "base": "power_of_two", "schedule": "fixed", "max_offset": 9, "rung_reach": 9},
            r"base is 'power_of_two', schedule is 'fixed', rung_reach is 9, max_offset is 9 and blocks 1; beyond the",
        ),
        ({"window": 3, "blocks": 0}, r"blocks is 0; a query chooses 1 to 64"),
        ({"window": 3, "blocks": 2.5}, r"blocks is 2.5; it must be a whole number"),
        ({"window": 3, "blocks": 1, "block_size": 8}, r"block is 8; blocks have 16, 32, 64 or 128 keys"),
        (
            {"window": 3, "blocks": 1, "block_reach": 1024},
            r"reach is 1024; it must be at least the window, 3, and below",
        ),
        ({"window": 128, "blocks": 1}, r"the blocks' reach is 127; it must be at least the window, 128"),
        ({"window": 3, "block_reach": 9}, r"block_reach is 9, without blocks; give blocks, too"),
        ({"window": 3, "block_size": 32, "block_anchor": False}, r"size is 32, block_anchor is False, without blocks"),
        ({"window": 3, "max_offset": 2.5}, r"max_offset is 2.5; it must be a whole number"),
        ({"window": 3, "full_reach": 0, "keep_layers": [0]}, "full_reach is 0; it must be at least 1, or None"),
        ({"window": 3, "full_reach": 9}, "full_reach is 9, but no layer keeps its own attention"),
        ({"window": 2.5}, "window is 2.5; it must be a whole number"),
    ],
)
def test_patterns_that_cannot_be(given: dict[str, Any], reason: str) -> None:
    made, ids = model(), tokens()
    right, before = made(ids).logits, made.config.to_dict()
    with pytest.raises(InputError, match=reason):
        fibattn.convert(made, **given)
    assert torch.equal(made(ids).logits, right)
    assert made.config.to_dict() == before


@torch.no_grad()
def test_calls_that_cannot_be_right() -> None:
    made, ids = model(), tokens()
    dense = made(ids).past_key_values
    with pytest.raises(InputError, match="nothing to restore"):
        fibattn.restore(made)
    fibattn.convert(made, **PATTERN, keep_layers=[3])
    with pytest.raises(InputError, match="begin a new one"):
        made(ids, past_key_values=dense)
    with pytest.raises(InputError, match=re.escape("attention_mask has shape (2, 1, 50, 50)")):
        made(ids, attention_mask=torch.ones(2, 1, 50, 50, dtype=torch.bool))
    with pytest.raises(InputError, match="zeros between ones"):
        made(ids, attention_mask=(ids > 0).int().index_fill(1, torch.tensor([20]), 0))
    with pytest.raises(InputError, match="name those after"):
        made.base_model(ids, None, None, None)
    used = made(ids).past_key_values
    other = fibattn.convert(model(), window=4, keep_layers=[3])
    with pytest.raises(InputError, match="was written for the pattern"):
        other(ids, past_key_values=used)
    made.set_attn_implementation("eager")
    with pytest.raises(InputError, match="set to 'eager'"):
        made(ids)
    fibattn.restore(made)
    assert made.config._attn_implementation == "sdpa"
