"""The chat template of a finished model: roles, ends of turns, and marks for training on the answers alone."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fibattn.data.tokenizer import load_tokenizer
from fibattn.training import run

pytest.importorskip("jinja2", reason="jinja2 is not installed")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": " 4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


@pytest.fixture
def tokenizer(prepared: Path, tmp_path: Path) -> PreTrainedTokenizerBase:
    """As a finished model has it, saved and loaded."""
    made = load_tokenizer(prepared / "tokenizer")
    made.chat_template = run._CHAT.read_text(encoding="utf-8")
    made.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def text(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]], **how: Any) -> str:
    return str(tokenizer.apply_chat_template(talk, tokenize=False, **how))


def test_turns_have_a_role_and_an_end(tokenizer: PreTrainedTokenizerBase) -> None:
    end = str(tokenizer.eos_token)
    expected = (
        f"{tokenizer.bos_token}System:\nBe brief.{end}\nUser:\nWhat is 2 + 2?{end}\nAssistant:\n4{end}\n"
        f"User:\nAnd 3 + 3?{end}\nAssistant:\n6{end}\n"
    )
    assert text(tokenizer, TALK) == expected
    assert text(tokenizer, TALK[:4], add_generation_prompt=True) == expected.removesuffix(f"6{end}\n")


def test_answers_and_their_ends_are_marked_for_training(tokenizer: PreTrainedTokenizerBase) -> None:
    how: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    found: Any = tokenizer.apply_chat_template(TALK, **how)
    marked = [one for one, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == f"4{tokenizer.eos_token}6{tokenizer.eos_token}"
    assert marked.count(tokenizer.eos_token_id) == 2


def test_a_talk_begins_the_same_whatever_follows(tokenizer: PreTrainedTokenizerBase) -> None:
    """What is generated for must be how it was trained on, token for token."""
    whole: Any = tokenizer.apply_chat_template(TALK, return_dict=False)
    for turns in (2, 4):
        asked: Any = tokenizer.apply_chat_template(TALK[:turns], add_generation_prompt=True, return_dict=False)
        assert whole[: len(asked)] == asked
