"""Scores of choices against one plain pass a choice."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fibattn import FibAttnForCausalLM
from fibattn.errors import InputError
from study.probes.forced_choice import Item, continuation_logprobs, judge


def one_by_one(model: FibAttnForCausalLM, prompt: list[int], choice: list[int]) -> float:
    with torch.no_grad():
        logs = model(torch.tensor([prompt + choice])).logits[0].log_softmax(dim=-1)
    return sum(logs[len(prompt) + step - 1, token].item() for step, token in enumerate(choice))


def test_scores_do_not_depend_on_the_batch(model: FibAttnForCausalLM) -> None:
    pairs = [([0, 5, 9], [7, 8]), ([0, 4, 4, 4, 9, 2, 100], [3]), ([0], [9, 400, 9, 9]), ([0, 1], [2])]
    together = continuation_logprobs(model, pairs)
    assert together == pytest.approx([one_by_one(model, *pair) for pair in pairs], rel=1e-4)


def test_judge_against_plain_scores(model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    items = [Item(f"line {number} follows", (" a1", " b22", " c3;"), number % 3) for number in range(7)]
    margins = []
    for item in items:
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(item.prompt)]
        scores = []
        for choice in item.choices:
            whole = [tokenizer.bos_token_id, *tokenizer.encode(item.prompt + choice)]
            assert whole[: len(prompt)] == prompt
            scores.append(one_by_one(model, prompt, whole[len(prompt) :]))
        margins.append(scores.pop(item.answer) - max(scores))
    found = judge(model, tokenizer, items, label="test", batch=3)
    assert found["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)
    assert found["margin"] == pytest.approx(sum(margins) / 7, rel=1e-4)
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["items"] == 7


def test_choices_that_change_the_prompts_last_token(
    model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`12` may be one token: then the border token as a whole belongs to the choice, and both stay comparable."""
    split = tokenizer.encode("x 1") != tokenizer.encode("x 12")[: len(tokenizer.encode("x 1"))]
    assert split, "the tokenizer has no token of two digits to test with"
    found = judge(model, tokenizer, [Item("x 1", ("2", "3"), 0)], label="test")
    bos = tokenizer.bos_token_id
    whole = [[bos, *tokenizer.encode(f"x 1{digit}")] for digit in "23"]
    scores = [one_by_one(model, ids[:-1], ids[-1:]) for ids in whole]
    assert found["margin"] == pytest.approx(scores[0] - scores[1], rel=1e-4)


class Indifferent(nn.Module):
    """Finds everything equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(len(input_ids), logits_to_keep, 512))


def test_a_tie_is_wrong(tokenizer: PreTrainedTokenizerBase) -> None:
    found = judge(Indifferent(), tokenizer, [Item("a", (" 1", " 2"), 1)] * 3, label="test")
    assert (found["accuracy"], found["margin"]) == (0.0, 0.0)


def test_no_items_are_refused(model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="number of items is 0"):
        judge(model, tokenizer, [], label="test")
