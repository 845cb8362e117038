"""RULER's variable tracking as a forced choice (RULER, arXiv 2404.06654; scored as in the paper, section 7).

A value is handed on through a chain of variables, hidden among statements that give other variables values of
their own. The model is asked for the value of the last variable of the chain, among all values in the text.

Own code, since lm-eval's `ruler_vt` is another task: it has the model write down all variables of a chain, over 4,096
tokens of filler and more, where a small model is at the floor at once. For LEGO lm-eval has no task.
"""

import random
import string
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fibattn.errors import InputError
from study.probes.forced_choice import Item, judge
from study.probes.settings import Ruler

HOPS = (2, 3, 4)
DISTRACTORS = 8


def variable_tracking(hops: int, count: int, seed: int = 0) -> list[Item]:
    """`count` items whose chain takes `hops` steps; nine values, so chance is 1/9.

    Raises:
        InputError: for fewer than one hop.
    """
    if hops < 1:
        raise InputError(f"the number of hops is {hops}; it must be at least 1")
    rng = random.Random(f"variable tracking, {hops} hops, seed {seed}")
    return [_item(rng, hops) for _ in range(count)]


def _item(rng: random.Random, hops: int) -> Item:
    names = _names(rng, hops + 1 + DISTRACTORS)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), 1 + DISTRACTORS)]
    chain = [f"VAR {names[0]} = {values[0]}."]
    chain += [f"VAR {names[hop + 1]} = VAR {names[hop]}." for hop in range(hops)]
    others = [f"VAR {name} = {value}." for name, value in zip(names[hops + 1 :], values[1:], strict=True)]
    rng.shuffle(others)
    # The chain keeps its order; which statements belong to it is drawn.
    of_chain = set(rng.sample(range(len(chain) + len(others)), len(chain)))
    statements = [chain.pop(0) if at in of_chain else others.pop() for at in range(len(chain) + len(others))]
    text = "Memorize and track the chain of variable assignments hidden in the following text.\n"
    text += " ".join(statements)
    text += f"\nQuestion: What is the value of the variable {names[hops]}?\nAnswer: VAR {names[hops]} ="
    choices = rng.sample(values, len(values))
    return Item(text, tuple(f" {value}" for value in choices), choices.index(values[0]))


def _names(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=3))] = None
    return list(names)


def ruler(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Ruler, *, quiet: bool = False
) -> dict[str, Any]:
    """Variable tracking over two, three and four hops; the result is plain JSON values.

    `judge` says what is measured and raised.
    """
    rows = [
        {"hops": hops, **judge(model, tokenizer, asked, label=f"ruler {hops} hops", batch=settings.batch, quiet=quiet)}
        for hops in HOPS
        for asked in [variable_tracking(hops, settings.items, settings.seed)]
    ]
    return {"probe": "ruler", "distractors": DISTRACTORS, "seed": settings.seed, "rows": rows}
