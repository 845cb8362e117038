"""Small random models of other kinds, to be converted."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS, VOCABULARY, SLIDING = 4, 61, 12
PATTERN: dict[str, Any] = {"window": 3, "rungs": 7}
EXTRA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": SLIDING},
    "mixtral": {"sliding_window": None, "num_local_experts": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 2},
    "gemma3_text": {"sliding_window": SLIDING, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5},
}


def configuration(architecture: str, **changes: Any) -> Any:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **EXTRA.get(architecture, {}),
        **changes,
    }
    return AutoConfig.for_model(architecture, **values)


def model(architecture: str = "llama", kind: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    made = kind.from_config(configuration(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
    return made


def tokens(batch: int = 2, length: int = 50) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
