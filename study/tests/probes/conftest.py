"""A tokenizer and an untrained model that goes with it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fibattn import FibAttnConfig, FibAttnForCausalLM


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(prepared / "tokenizer")


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerBase) -> FibAttnForCausalLM:
    """Large weights, so that its choices differ clearly."""
    torch.manual_seed(0)
    config = FibAttnConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        window=6,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return FibAttnForCausalLM(config).eval()
