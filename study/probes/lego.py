"""LEGO over Z/2 as a forced choice (LEGO, arXiv 2206.04301; scored as in the paper, section 7).

A chain of variables, each the one before it or its negation, the clauses in any order. The model is asked for the
last variable: 0 or 1.
"""

import random
import string
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fibattn.errors import InputError
from study.probes.forced_choice import Item, judge
from study.probes.settings import Lego

LENGTHS = (2, 3, 4)


def chains(length: int, count: int, seed: int = 0) -> list[Item]:
    """`count` items with `length` variables; as many have the answer 0 as 1, so a fixed answer scores one half.

    Raises:
        InputError: for a chain of fewer than one variable, or more than there are letters.
    """
    if not 1 <= length <= len(string.ascii_lowercase):
        raise InputError(f"the length of the chain is {length}; it must be from 1 to {len(string.ascii_lowercase)}")
    rng = random.Random(f"LEGO, length {length}, seed {seed}")
    return [_item(rng, length, number % 2) for number in range(count)]


def _item(rng: random.Random, length: int, answer: int) -> Item:
    names = rng.sample(string.ascii_lowercase, length)
    negated = [rng.random() < 0.5 for _ in names[1:]]
    first = (answer + sum(negated)) % 2
    clauses = [f"{names[0]} = {first};"]
    clauses += [
        f"{name} = {'not ' if no else ''}{before};" for before, name, no in zip(names, names[1:], negated, strict=False)
    ]
    rng.shuffle(clauses)
    return Item(f"{' '.join(clauses)} therefore {names[-1]} =", (" 0", " 1"), answer)


def lego(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Lego, *, quiet: bool = False
) -> dict[str, Any]:
    """Chains of two, three and four variables; the result is plain JSON values.

    `judge` says what is measured and raised.
    """
    rows = [
        {
            "length": length,
            **judge(model, tokenizer, asked, label=f"lego length {length}", batch=settings.batch, quiet=quiet),
        }
        for length in LENGTHS
        for asked in [chains(length, settings.items, settings.seed)]
    ]
    return {"probe": "lego", "seed": settings.seed, "rows": rows}
