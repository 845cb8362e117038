"""The chat template of a finished model: roles, ends of turns, and marks for training on the answers alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fibattn.data.plan import Plan
from fibattn.data.prepare import prepare
from fibattn.data.sources import parse_source
from fibattn.data.tokenizer import load_tokenizer, train_tokenizer
from fibattn.training import run
from fibattn.training.recipe import Recipe

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


@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), (None, "</s>"), ("<s>", None)])
def test_texts_and_turns_end_whichever_tokens_there_are(
    bos: str | None, eos: str | None, recipe: Recipe, tmp_path: Path
) -> None:
    made = train_tokenizer(["so says line 7 of text"] * 9, 300).backend_tokenizer
    given = {name: one for name, one in (("bos_token", bos), ("eos_token", eos)) if one}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **given)
    tokenizer.add_special_tokens(given)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("so says line 7 of text\n" * 200)
    plan = Plan((parse_source(str(tmp_path / "a.txt")),), held_out=0.0, tokenizer=str(tmp_path / "tokenizer"))
    prepare(tmp_path / "data", plan, quiet=True)
    folder = run.train(replace(recipe, data=tmp_path / "data", steps=1))
    ids = [tokenizer.convert_tokens_to_ids(one) for one in (bos, eos) if one]
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == (ids if len(ids) > 1 else ids[0])
    finished = AutoTokenizer.from_pretrained(folder)
    begin, end = bos or eos, eos or bos
    assert text(finished, TALK[1:3]) == f"{begin}User:\nWhat is 2 + 2?{end}\nAssistant:\n4{end}\n"
