"""Models small enough for milliseconds: one of every kind that the study has, and mixtures."""

from typing import Any

import torch
from torch import Tensor

from fibattn import FibAttnConfig, FibAttnForCausalLM

VOCABULARY = 61

KINDS: dict[str, dict[str, Any]] = {
    "fixed": {"schedule": "fixed"},
    "linear": {"schedule": "linear"},
    "coprime": {"schedule": "coprime"},
    "learned": {"schedule": "learned"},
    "power_of_two": {"base": "power_of_two"},
    "clipped": {"max_offset": 20},
    "sliding": {"layer_types": ["sliding_attention"] * 4},
    "full": {"layer_types": ["full_attention"] * 4},
    "full, linear RoPE": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    },
    "mixture": {
        "layer_types": ["fibonacci_attention", "full_attention", "sliding_attention", "fibonacci_attention"],
        "no_rope_layers": [1, 0, 1, 1],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "learned mixture": {
        "schedule": "learned",
        "layer_types": ["fibonacci_attention", "full_attention", "fibonacci_attention", "sliding_attention"],
        "no_rope_layers": [0, 1, 1, 1],
    },
    "bounded mixture": {
        "layer_types": ["fibonacci_attention", "full_attention", "sliding_attention", "full_attention"],
        "no_rope_layers": [1, 0, 1, 1],
        "full_reach": 17,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    },
    "chosen": {
        "layer_types": ["chosen_attention", "full_attention", "sliding_attention", "chosen_attention"],
        "no_rope_layers": [1, 0, 1, 0],
        "blocks": 1,
        "block_reach": 45,
        "kv_convolution": 3,
        "value_embeddings": True,
    },
    "chosen, rotated": {
        "layer_types": ["chosen_attention", "full_attention", "chosen_attention", "sliding_attention"],
        "no_rope_layers": [1, 0, 1, 1],
        "blocks": 2,
        "block_reach": 48,
        "block_rope": True,
        "block_anchor": True,
    },
    "untied": {"tie_word_embeddings": False},
    "modern": {
        "layer_types": ["fibonacci_attention", "full_attention", "sliding_attention", "fibonacci_attention"],
        "no_rope_layers": [1, 0, 1, 1],
        "hidden_act": "relu2",
        "gated_mlp": False,
        "qk_norm": True,
        "embedding_skip": True,
        "head_gates": True,
        "value_embeddings": True,
    },
}


def config(kind: str = "linear", **changes: Any) -> FibAttnConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "window": 4,
        "rungs": 8,
        **KINDS[kind],
        **changes,
    }
    return FibAttnConfig(**values)


def model(kind: str = "linear", **changes: Any) -> FibAttnForCausalLM:
    """A model in evaluation mode with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    made = FibAttnForCausalLM(config(kind, **{"initializer_range": 0.4, **changes})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("theta"):
                parameter.fill_(-0.37 + 0.2 * made.config.num_hidden_layers)
            if name.endswith("gate.weight"):
                parameter.uniform_(-0.4, 0.4)
            if "norm" in name or name.endswith(("skip", "trust", "kv_convolution")):
                parameter.uniform_(0.5, 1.5)
    return made


def tokens(batch: int = 2, length: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def whole(m: Any, ids: Tensor, **how: Any) -> Tensor:
    """The logits of a text that is read at once, without a cache."""
    return m(ids, use_cache=False, **how).logits


def close_logits(found: Tensor, expected: Tensor) -> None:
    """The logits of two ways through a model, equal but for rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=3e-4)
