"""LEGO chains, solved by substitution."""

import re

import pytest
from transformers import PreTrainedTokenizerBase

from fibattn import FibAttnForCausalLM
from fibattn.errors import InputError
from study.probes.forced_choice import Item
from study.probes.lego import LENGTHS, chains, lego
from study.probes.settings import Lego


def solve(item: Item) -> tuple[int, int]:
    """The value asked for and the length of its chain."""
    clauses = {name: (no, right) for name, no, right in re.findall(r"(\w) = (not )?(\w);", item.prompt)}
    name = re.findall(r"therefore (\w) =$", item.prompt)[0]
    flips, length = 0, 0
    while name in clauses:
        no, name = clauses[name]
        flips, length = flips + bool(no), length + 1
    assert length == len(clauses)
    return (int(name) + flips) % 2, length


@pytest.mark.parametrize("length", LENGTHS)
def test_right_answer_follows(length: int) -> None:
    items = chains(length, 120)
    assert all(solve(item) == (item.answer, length) for item in items)
    assert all(item.choices == (" 0", " 1") for item in items)
    assert sum(item.answer for item in items) == 60


def test_first_value_says_nothing() -> None:
    items = chains(3, 400)
    same = sum(re.findall(r"= (\d);", item.prompt)[0] == str(item.answer) for item in items)
    assert 150 < same < 250


def test_items_repeat_with_the_seed() -> None:
    assert chains(4, 6, seed=1) == chains(4, 9, seed=1)[:6]
    assert chains(4, 6, seed=1) != chains(4, 6, seed=2)


def test_lego_reports_every_length(model: FibAttnForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    result = lego(model, tokenizer, Lego(items=4))
    assert [(row["length"], row["chance"]) for row in result["rows"]] == [(2, 0.5), (3, 0.5), (4, 0.5)]
    assert all(row["accuracy"] in (0, 0.25, 0.5, 0.75, 1) for row in result["rows"])


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="length of the chain is 27"):
        chains(27, 1)
