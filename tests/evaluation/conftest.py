"""An untrained model that goes with the prepared text."""

from pathlib import Path

import pytest
import torch

from fibattn import FibAttnConfig, FibAttnForCausalLM
from fibattn.data.prepared import PreparedData


@pytest.fixture(scope="session")
def model(prepared: Path) -> FibAttnForCausalLM:
    """Large weights, so that its choices differ clearly."""
    data = PreparedData.open(prepared)
    torch.manual_seed(0)
    config = FibAttnConfig(
        vocab_size=data.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        window=6,
        initializer_range=0.4,
        bos_token_id=data.separator,
        eos_token_id=data.separator,
    )
    return FibAttnForCausalLM(config).eval()
