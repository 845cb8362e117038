"""The tokenizer of the prepared text."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(prepared / "tokenizer")
